//! What a running guest depends on of its host beyond its layers, and what a host offers: compared before a move.
//!
//! The same description is made at both sides: by the source of what the guest runs on, by the destination of what there is.
//! Hides which of a processor's abilities programs see. Invariant: what isn't known isn't compared.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::{Obstacle, memory};

/// What a host is, as far as a guest may depend on it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Surroundings {
    /// The processor's kind: "x86_64".
    pub arch: Option<String>,
    /// The kernel's version, if the guest's processes talk to it.
    pub kernel: Option<(u32, u32)>,
    /// What the processor can do beyond its kind's least, if the guest's programs see it.
    pub abilities: BTreeSet<String>,
    /// What emulates the machine that a guest is.
    pub accels: BTreeSet<String>,
    /// The emulator's version.
    pub emulator: Option<(u32, u32)>,
    /// Memory in bytes: at the source what the guest has in use, at the destination what there is for it.
    pub memory: Option<u64>,
    /// At the source whether the guest has tables of nftables, at the destination whether it has `nft` to make them.
    pub nft: bool,
}

impl Surroundings {
    /// What the processes of this host see; `memory` is what those of a guest have in use that runs here.
    pub fn of_processes(memory: Option<u64>) -> Surroundings {
        let uname = rustix::system::uname();
        let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        Surroundings {
            arch: Some(std::env::consts::ARCH.to_owned()),
            kernel: version(&uname.release().to_string_lossy()),
            abilities: abilities(&cpu),
            memory: memory.or_else(memory::obtainable),
            ..Surroundings::default()
        }
    }

    /// What a guest that runs in `needed` would miss here.
    pub fn lacks(&self, needed: &Surroundings) -> Vec<Obstacle> {
        let mut found = Vec::new();
        if let (Some(here), Some(there)) = (&self.arch, &needed.arch)
            && here != there
        {
            let fix = "move it to a host with the same kind of processor";
            found.push(Obstacle::new(format!("the destination's processor is {here}, the source's {there}"), fix));
            return found;
        }
        let missing: Vec<&str> = needed.abilities.difference(&self.abilities).map(String::as_str).collect();
        if !missing.is_empty() {
            let what = format!("the destination's processor lacks what programs may be using: {}", missing.join(", "));
            found.push(Obstacle::new(what, ANEW));
        }
        if let (Some(here), Some(there)) = (self.kernel, needed.kernel)
            && here < there
        {
            let what = format!(
                "the destination's kernel ({}.{}) is older than the source's ({}.{})",
                here.0, here.1, there.0, there.1
            );
            found.push(Obstacle::new(what, format!("update it, or {ANEW}; {FORCE}")));
        }
        if let (Some(here), Some(there)) = (self.emulator, needed.emulator)
            && here < there
        {
            let what = format!(
                "the destination's QEMU ({}.{}) is older than the source's ({}.{})",
                here.0, here.1, there.0, there.1
            );
            found.push(Obstacle::new(what, "update it"));
        }
        if let (Some(here), Some(there)) = (self.memory, needed.memory)
            && here < there
        {
            let what = format!(
                "the guest has {} in use, and the destination has only {} for it",
                mebibytes(there),
                mebibytes(here)
            );
            found.push(Obstacle::new(what, "end something there or give it swap, or move with --postcopy"));
        }
        if needed.nft && !self.nft {
            let what = "the guest has tables of nftables, and the destination has no `nft` to make them";
            found.push(Obstacle::new(what, "apt-get install nftables there"));
        }
        for accel in needed.accels.difference(&self.accels) {
            let fix = match accel.as_str() {
                "kvm" => {
                    "give it /dev/kvm (firmware, nested virtualization), or start the machine anew with --accel tcg"
                }
                _ => "start the machine anew with an --accel that both hosts have",
            };
            found.push(Obstacle::new(format!("the destination can't run machines by {accel}"), fix));
        }
        found
    }
}

const ANEW: &str = "begin it anew there: guest stop, guest checkpoint or push of its layers, guest start";

const FORCE: &str = "--force-kernel moves it all the same: it may not be restored there, and then comes back, or its programs may fail \
                     later, when they use what that kernel lacks";

/// An amount of memory, for people.
pub fn mebibytes(bytes: u64) -> String {
    format!("{} MiB of memory", bytes.div_ceil(1 << 20))
}

/// The first two numbers of a version.
pub(super) fn version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

/// What programs look for when they choose how to compute, of what `/proc/cpuinfo` says.
fn abilities(cpuinfo: &str) -> BTreeSet<String> {
    let line = cpuinfo.lines().find(|line| line.starts_with("flags") || line.starts_with("Features"));
    let flags = line.and_then(|line| line.split_once(':')).map_or("", |(_, flags)| flags);
    let starts = ["sse", "ssse", "avx", "amx", "bmi", "xsave", "sha", "vaes", "sve", "asimd"];
    let exact = [
        "fma",
        "aes",
        "movbe",
        "popcnt",
        "adx",
        "abm",
        "f16c",
        "gfni",
        "vpclmulqdq",
        "pclmulqdq",
        "rdrand",
        "rdseed",
        "fsgsbase",
        "rdpid",
        "erms",
        "fsrm",
        "clwb",
        "clflushopt",
        "movdiri",
        "movdir64b",
        "serialize",
        "crc32",
        "atomics",
    ];
    let counts = |flag: &&str| exact.contains(flag) || starts.iter().any(|start| flag.starts_with(start));
    flags.split_ascii_whitespace().filter(counts).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_destination_lacks_is_named() {
        let cpu = "processor : 0\nflags\t\t: fpu sse2 avx2 avx512f aes vmx\nbugs : none\n";
        let here = Surroundings { abilities: abilities(cpu), kernel: version("6.18.5-foo"), ..Surroundings::default() };
        assert_eq!(here.abilities.iter().map(String::as_str).collect::<Vec<_>>(), ["aes", "avx2", "avx512f", "sse2"]);
        assert_eq!(here.kernel, Some((6, 18)));
        assert!(here.lacks(&here).is_empty());
        let poorer = Surroundings { abilities: abilities("flags : sse2 aes"), kernel: Some((6, 1)), ..here.clone() };
        let found = poorer.lacks(&here);
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].what.contains("avx2, avx512f") && found[1].what.contains("6.1"), "{found:?}");
        assert!(here.lacks(&poorer).is_empty());
        let machine = |accel: &str, emulator| Surroundings {
            accels: [accel.to_owned()].into(),
            emulator: Some(emulator),
            ..Surroundings::default()
        };
        assert_eq!(machine("tcg", (9, 2)).lacks(&machine("kvm", (10, 0))).len(), 2);
        assert!(machine("tcg", (10, 1)).lacks(&machine("tcg", (10, 0))).is_empty());
        let memory = |bytes| Surroundings { memory: Some(bytes), ..Surroundings::default() };
        assert!(memory(6 << 30).lacks(&memory(6 << 30)).is_empty());
        let found = memory(2 << 30).lacks(&memory((6 << 30) - 1));
        assert!(
            found.len() == 1 && found[0].what.contains("6144 MiB") && found[0].what.contains("2048 MiB"),
            "{found:?}"
        );
        let rules = Surroundings { nft: true, ..Surroundings::default() };
        assert!(rules.lacks(&rules).is_empty() && rules.lacks(&Surroundings::default()).is_empty());
        assert_eq!(Surroundings::default().lacks(&rules).len(), 1);
        // A host of an earlier version says nothing of it.
        assert!(memory(0).lacks(&serde_json::from_str("{}").unwrap()).is_empty());
        assert!(Surroundings::default().lacks(&memory(6 << 30)).is_empty());
        let arm = Surroundings { arch: Some("aarch64".to_owned()), ..here.clone() };
        let intel = Surroundings { arch: Some("x86_64".to_owned()), ..here };
        assert_eq!(arm.lacks(&intel).len(), 1);
    }
}
