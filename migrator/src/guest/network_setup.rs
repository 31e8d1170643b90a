//! What a guest has set up in its own network beside what [`super::network`] makes there: addresses, routes, nftables, settings. It goes
//! along with the guest's state, in a file of its own.
//!
//! Hides the words of `ip` and `nft`. Invariants: what can't be carried is named, before a move and again at the dump, and never left
//! behind in silence; of what a state brings nothing reaches a program that isn't about the guest's own network.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use layerfs::LayerId;
use layerfs::id::Ino;
use layerfs::store::Store;
use layerfs::view::View;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Obstacle;
use super::network::INSIDE;
use super::nftables::table_names;
use super::programs::{Programs, run, run_with};

/// Has `ip` say tables, protocols and scopes by their numbers: what they are called is each host's own affair.
const NUMBERS: &str = "-N";
/// Such numbers: tables, who has made a route, and how far an address or a route is known.
const TABLE_LOCAL: u64 = 255;
const TABLE_MAIN: u64 = 254;
const TABLE_DEFAULT: u64 = 253;
const BY_REDIRECT: u64 = 1;
const BY_KERNEL: u64 = 2;
const BY_BOOT: u64 = 3;
const BY_RA: u64 = 9;
const SCOPE_GLOBAL: u64 = 0;
const SCOPE_LINK: u64 = 253;
/// Whether the kernel itself makes routes of what routers advertise.
const ACCEPT_RA: &str = "ipv6/conf/eth0/accept_ra";
/// The file in a state.
pub(super) const FILE: &str = "network.json";
/// The longest file, and the longest ruleset, in bytes: no more is read of what comes with a state, so no more is written.
const MAX_BYTES: usize = 16 << 20;
const MAX_RULESET: usize = 4 << 20;
/// The tables by which CRIU locks connections: its own affair.
const CRIU: &str = "CRIU";
/// Where the older iptables' tables in this thread's namespace are named.
const NAMES: &str = "/proc/thread-self/net";
/// Devices that the kernel puts into each namespace by itself.
const FALLBACKS: [&str; 11] =
    ["tunl0", "gre0", "gretap0", "erspan0", "sit0", "ip6tnl0", "ip6gre0", "ip_vti0", "ip6_vti0", "teql0", "ip6erspan0"];
/// The settings that are carried, below `/proc/sys/net`. What turns forwarding on sets others, so it comes first.
const SETTINGS: [&str; 14] = [
    "ipv4/ip_forward",
    "ipv6/conf/all/forwarding",
    "core/somaxconn",
    "ipv4/icmp_echo_ignore_all",
    "ipv4/ip_local_port_range",
    "ipv4/ip_nonlocal_bind",
    "ipv4/ip_unprivileged_port_start",
    "ipv4/ping_group_range",
    "ipv4/tcp_fin_timeout",
    "ipv4/tcp_keepalive_intvl",
    "ipv4/tcp_keepalive_probes",
    "ipv4/tcp_keepalive_time",
    "ipv4/tcp_syncookies",
    "ipv6/ip_nonlocal_bind",
];
/// The same, for each interface.
const INTERFACE_SETTINGS: [&str; 13] = [
    "ipv4/conf/*/accept_local",
    "ipv4/conf/*/accept_redirects",
    "ipv4/conf/*/arp_announce",
    "ipv4/conf/*/arp_ignore",
    "ipv4/conf/*/proxy_arp",
    "ipv4/conf/*/route_localnet",
    "ipv4/conf/*/rp_filter",
    "ipv4/conf/*/send_redirects",
    "ipv4/conf/*/src_valid_mark",
    "ipv6/conf/*/accept_ra",
    "ipv6/conf/*/autoconf",
    "ipv6/conf/*/disable_ipv6",
    "ipv6/conf/*/use_tempaddr",
];

type Outcome<T> = Result<T, String>;

/// What is set up in a guest's network.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct NetworkSetup {
    /// The longest packet of the guest's interface, in bytes.
    #[serde(default)]
    mtu: u32,
    /// What `ip address add` is told, of each.
    #[serde(default)]
    addresses: Vec<Vec<String>>,
    /// What `ip route add` is told, of each: first those that others lead over.
    #[serde(default)]
    routes: Vec<Vec<String>>,
    /// What `nft -f` reads.
    #[serde(default)]
    nftables: String,
    /// By names below `/proc/sys/net`.
    #[serde(default)]
    settings: BTreeMap<String, String>,
}

/// What is there and can't be carried: what it is, and how it goes away.
type Uncarried = Vec<(String, String)>;

/// A guest's network namespace.
pub(super) struct Inside<'a> {
    /// The programs.
    pub programs: &'a Programs,
    /// Its file.
    pub namespace: PathBuf,
}

impl Inside<'_> {
    /// Writes what is set up there into a state's folder.
    ///
    /// # Errors
    /// Why it can't be found out; what there is that can't be carried.
    pub fn save(&self, into: &Path) -> Outcome<()> {
        let (setup, uncarried) = self.look()?;
        if let Some((what, fix)) = uncarried.into_iter().next() {
            return Err(format!("its network has {what}, which would be lost: {fix}"));
        }
        let path = into.join(FILE);
        let json = serde_json::to_vec_pretty(&setup).map_err(|error| error.to_string())?;
        if json.len() > MAX_BYTES {
            return Err(format!("what the guest has set up in its network takes more than {MAX_BYTES} bytes"));
        }
        fs::write(&path, json).map_err(|error| format!("cannot write {}: {error}", path.display()))
    }

    /// Sets up what the state in `from` says, in a namespace that was just made with the address and the gateway that `made` says.
    /// Nothing is done if the state says nothing, as an earlier version's.
    ///
    /// # Errors
    /// What can't be set up.
    pub fn load(&self, from: &Path, made: &[Vec<String>; 2]) -> Outcome<()> {
        // By a program: the state may lie on a mount that this process serves.
        let words = ["-c", "[ ! -e \"$1\" ] || exec cat \"$1\"", "sh"];
        let read = run(Command::new("/bin/sh").args(words).arg(from.join(FILE)).stdin(Stdio::null()))?;
        if read.stdout.is_empty() {
            return Ok(());
        }
        let setup = NetworkSetup::parse(&read.stdout)?;
        let orders = setup.orders(made);
        within(&self.namespace, || {
            for (name, value, error) in settle(&orders.settings, set) {
                tracing::warn!(name, value, error, "a setting of a guest's network stays as it is on this host");
            }
            if !orders.ip.is_empty() {
                let ip = self.program("ip", "iproute2")?;
                run_with(Command::new(ip).args(["-batch", "-"]), orders.ip.as_bytes())?;
            }
            if !orders.nft.is_empty() {
                run_with(self.nft()?.args(["-f", "-"]), orders.nft.as_bytes())?;
            }
            Ok(())
        })
        .map_err(|error| format!("what it had set up in its network can't be set up here: {error}"))
    }

    /// What is set up there and wouldn't go along.
    pub fn obstacles(&self) -> Vec<Obstacle> {
        let found = self.look().map(|(setup, mut found)| {
            if !setup.nftables.is_empty()
                && check_ruleset(&setup.nftables).is_ok()
                && let Err(error) =
                    within(&self.namespace, || run_with(self.nft()?.args(["-c", "-f", "-"]), setup.nftables.as_bytes()))
            {
                let what = format!("an nftables ruleset that `nft` doesn't read again as it prints it ({error})");
                found.push((
                    what,
                    self.remedy("nft list ruleset", "says which; update nftables, or write it otherwise"),
                ));
            }
            found
        });
        let lost = |what| format!("its network has {what}, which would be lost");
        match found {
            Ok(found) => found.into_iter().map(|(what, fix)| Obstacle::new(lost(what), fix)).collect(),
            Err(error) => {
                let what = format!("it can't be found out what the guest has set up in its network: {error}");
                vec![Obstacle::new(what, "see to it that `ip` (iproute2) and `nft` (nftables) work on this host")]
            }
        }
    }

    /// Lets connections work again that a CRIU locked which has died.
    ///
    /// # Errors
    /// Why they may still be locked.
    pub fn unlock(&self) -> Outcome<()> {
        within(&self.namespace, || {
            let ruleset = self.ruleset(is_of_criu)?.unwrap_or_default();
            let locks = tables_of_criu(&ruleset).filter(|table| is_plain_table(table));
            let lines: String = locks.map(|table| format!("delete table {table}\n")).collect();
            if !lines.is_empty() {
                run_with(self.nft()?.args(["-f", "-"]), lines.as_bytes())?;
            }
            // Asking an iptables of what it has none may make tables.
            let has_legacy = |names| fs::read(Path::new(NAMES).join(names)).is_ok_and(|names| !names.is_empty());
            for (family, names) in [("iptables", "ip_tables_names"), ("ip6tables", "ip6_tables_names")] {
                if (ruleset.contains("chain CRIU {") || has_legacy(names))
                    && let Some(program) = self.programs.find(family)
                    && run(Command::new(&program).args(["-w", "-n", "-L", CRIU]).stdin(Stdio::null())).is_ok()
                {
                    for words in [["-D", "INPUT", "-j", CRIU], ["-D", "OUTPUT", "-j", CRIU]] {
                        // It may have died between the two.
                        let _ = run(Command::new(&program).arg("-w").args(words).stdin(Stdio::null()));
                    }
                    for word in ["-F", "-X"] {
                        run(Command::new(&program).args(["-w", word, CRIU]).stdin(Stdio::null()))?;
                    }
                }
            }
            Ok(())
        })
        .map_err(|error| {
            let namespace = self.namespace.display();
            format!(
                "its connections are still locked by a CRIU that has died: {error}; `nsenter --net={namespace} nft list ruleset` shows its \
                 tables, called {CRIU}-…, which may be deleted"
            )
        })
    }

    fn program(&self, name: &str, package: &str) -> Outcome<PathBuf> {
        self.programs.find(name).ok_or_else(|| format!("there is no `{name}`: apt-get install {package}"))
    }

    /// `nft`. The times of day in rules are said and read by the clock of the host that it runs on.
    fn nft(&self) -> Outcome<Command> {
        self.program("nft", "nftables").map(in_utc)
    }

    fn remedy(&self, command: &str, then: &str) -> String {
        format!("`nsenter --net={} {command}` {then}", self.namespace.display())
    }

    /// What is set up, and what there is that can't be carried. The programs work at the same time, as the guest may stand still.
    fn look(&self) -> Outcome<(NetworkSetup, Uncarried)> {
        within(&self.namespace, || {
            let (ip, panicked) = (self.program("ip", "iproute2")?, |_| Err("the thread panicked".to_owned()));
            let (told, rules, ruleset) = std::thread::scope(|scope| {
                let told = scope.spawn(|| {
                    let lines = b"address show\nroute show table all\nrule show\n";
                    run_with(Command::new(&ip).args([NUMBERS, "-d", "-j", "-batch", "-"]), lines)
                });
                let rules = scope
                    .spawn(|| run(Command::new(&ip).args([NUMBERS, "-6", "-d", "-j", "rule"]).stdin(Stdio::null())));
                let ruleset = self.ruleset(|name| !is_of_criu(name));
                (told.join().unwrap_or_else(panicked), rules.join().unwrap_or_else(panicked), ruleset)
            });
            let mut setup = NetworkSetup { settings: settings(), ..NetworkSetup::default() };
            let mut found = Uncarried::new();
            let told = told?.stdout;
            // Without IPv6 there are none of it.
            let rules = rules.map(|output| output.stdout).unwrap_or_default();
            for item in items(&told)?.into_iter().chain(items(&rules)?) {
                self.take(&item, &mut setup, &mut found);
            }
            // What leads over a gateway wants the way to that first.
            setup.routes.sort_by_key(|words| words.iter().any(|word| word == "via"));
            if let Some(text) = ruleset? {
                setup.nftables = without_criu(&text);
                if let Err(what) = check_ruleset(&setup.nftables) {
                    let fix = self.remedy(
                        "nft list ruleset",
                        "shows it: write it otherwise, or have what is long in it made by a hook, `after-restore`",
                    );
                    found.push((what, fix));
                }
                if is_foreign(&setup.nftables) {
                    let fix = self.remedy("nft list ruleset", "shows them: write them as rules of nftables");
                    found.push(("rules of iptables that nftables can't write".to_owned(), fix));
                }
            }
            if self.has_legacy_rules() {
                let fix = self.remedy("iptables-legacy-save", "shows them: write them as rules of nftables");
                found.push(("rules of the older iptables".to_owned(), fix));
            }
            Ok((setup, found))
        })
    }

    /// Takes what `ip` says of one thing.
    fn take(&self, item: &Value, setup: &mut NetworkSetup, found: &mut Uncarried) {
        if let Some(device) = item["ifname"].as_str() {
            let is_up = item["flags"].as_array().is_some_and(|flags| flags.iter().any(|flag| flag == "UP"));
            if device == INSIDE {
                setup.mtu = item["mtu"].as_u64().unwrap_or_default() as u32;
            } else if device != "lo" && (is_up || !FALLBACKS.contains(&device)) {
                let kind = item["linkinfo"]["info_kind"].as_str().unwrap_or("unknown");
                let fix = format!(
                    "remove it with `ip -n {} link del {device}` for as long as the guest moves; hooks can make it again",
                    self.namespace.file_name().unwrap_or_default().to_string_lossy()
                );
                found.push((format!("the device {device} ({kind})"), fix));
                return;
            }
            let addresses = item["addr_info"].as_array().into_iter().flatten();
            for words in addresses.filter_map(|address| address_words(device, address)) {
                match check_address(&words) {
                    Ok(()) => setup.addresses.push(words),
                    Err(word) => {
                        let what = format!("an address {} with {word:?}, which isn't known here", words[0]);
                        found.push((what, self.remedy("ip address", "shows it: enter it otherwise, or remove it")));
                    }
                }
            }
        } else if item["dst"].is_string() && item["priority"].is_null() {
            let is_by_itself = is_by_itself(item, setup.settings.get(ACCEPT_RA).is_none_or(|value| value != "0"));
            match if is_by_itself { Ok(None) } else { route_words(item).map(Some) } {
                Ok(words) => setup.routes.extend(words),
                Err(what) => {
                    let destination = item["dst"].as_str().unwrap_or_default();
                    let what = format!("a route to {destination} with {what}");
                    found.push((
                        what,
                        self.remedy("ip route show table all", "shows it: write it otherwise, or remove it"),
                    ));
                }
            }
        } else if item["priority"].is_u64() && !is_usual_rule(item) {
            let what = format!("a rule for routes, of priority {}", item["priority"]);
            found.push((what, self.remedy("ip rule", "shows it: do without it")));
        }
    }

    /// What `nft` says is set up; nothing without nftables. `counts` says of a table's name whether it matters: only then `nft` must be there.
    fn ruleset(&self, counts: impl Fn(&str) -> bool) -> Outcome<Option<String>> {
        let Some(nft) = self.programs.find("nft") else {
            let names = table_names().map_err(|error| format!("cannot ask for tables of nftables: {error}"))?;
            return match names.iter().find(|name| counts(name)) {
                Some(name) => {
                    Err(format!("nftables has a table {name}, and there is no `nft`: apt-get install nftables"))
                }
                None => Ok(None),
            };
        };
        match run(in_utc(nft).args(["list", "ruleset"]).stdin(Stdio::null())) {
            Ok(output) => Ok(Some(String::from_utf8_lossy(&output.stdout).into_owned())),
            // A kernel without nftables refuses it in many words.
            Err(error) => match table_names() {
                Ok(names) if !names.iter().any(|name| counts(name)) => Ok(None),
                _ => Err(error),
            },
        }
    }

    /// Whether there are tables of nftables, which go along.
    pub fn has_tables(&self) -> bool {
        let names = within(&self.namespace, || table_names().map_err(|error| error.to_string()));
        // What isn't known is no obstacle; it is found out when it is to be carried.
        names.is_ok_and(|names| names.iter().any(|name| !is_of_criu(name)))
    }

    /// Whether there are rules that nftables knows nothing of. That only tables are there may come from having been looked at; where
    /// nothing can say what is in them it counts.
    fn has_legacy_rules(&self) -> bool {
        let families = [
            ("ip_tables_names", ["iptables-legacy-save", "iptables-save"]),
            ("ip6_tables_names", ["ip6tables-legacy-save", "ip6tables-save"]),
        ];
        let says = |program: &str| {
            let said = run(Command::new(self.programs.find(program)?).stdin(Stdio::null())).ok()?;
            let text = String::from_utf8_lossy(&said.stdout).into_owned();
            // One by that name may be of nftables, and knows nothing of them either.
            let is_of_nftables = |line: &str| line.starts_with('#') && (line.contains("nf") || line.contains("legacy"));
            (program.contains("legacy") || !text.lines().any(is_of_nftables)).then_some(text)
        };
        let counts = |line: &str| line.starts_with("-A") || line.starts_with(':') && line.contains(" DROP ");
        families.into_iter().any(|(names, programs)| {
            let has_tables = fs::read(Path::new(NAMES).join(names)).is_ok_and(|names| !names.is_empty());
            has_tables
                && programs
                    .into_iter()
                    .find_map(says)
                    .is_none_or(|text| text.lines().any(|line| counts(line) && !line.contains(CRIU)))
        })
    }
}

/// What is to be done for a setup.
pub(super) struct Orders<'a> {
    /// Settings to be written, in this order.
    pub settings: Vec<(&'a str, &'a str)>,
    /// Lines for `ip`.
    pub ip: String,
    /// What `nft` reads.
    pub nft: &'a str,
}

impl NetworkSetup {
    /// What a state's file says, if nothing in it is refused.
    ///
    /// # Errors
    /// Why it is refused.
    pub(super) fn parse(json: &[u8]) -> Outcome<NetworkSetup> {
        if json.len() > MAX_BYTES {
            return Err(format!("{FILE} of its state is longer than {MAX_BYTES} bytes"));
        }
        let setup: NetworkSetup = serde_json::from_slice(json)
            .map_err(|error| format!("{FILE} of its state can't be read, it may be of a later version: {error}"))?;
        setup.check()?;
        Ok(setup)
    }

    /// Whether all that it says is about the guest's own network: nothing of it may lead a program of the host elsewhere.
    fn check(&self) -> Outcome<()> {
        let addresses = self.addresses.iter().map(|words| check_address(words));
        let routes = self.routes.iter().map(|words| check_route(words));
        if let Some(word) = addresses.chain(routes).find_map(Result::err) {
            return Err(format!("{word:?} in {FILE} of its state is no part of an address or a route"));
        }
        check_ruleset(&self.nftables).map_err(|what| format!("{FILE} of its state has {what}"))?;
        let is_value = |value: &str| value.bytes().all(|byte| byte == b'\t' || !byte.is_ascii_control());
        match self.settings.iter().find(|(_, value)| !is_value(value)) {
            Some((name, _)) => Err(format!("the value of {name:?} in {FILE} of its state is none of a setting")),
            None => Ok(()),
        }
    }

    /// What is to be done for it where what `made` says is there.
    pub(super) fn orders(&self, made: &[Vec<String>; 2]) -> Orders<'_> {
        let [address, route] = made;
        let known: Vec<String> = known_settings().collect();
        let order = |name: &str| known.iter().position(|known| known == name);
        for (name, value) in self.settings.iter().filter(|(name, _)| order(name).is_none()) {
            tracing::warn!(
                name,
                value,
                "a setting of a guest's network isn't known to this version: it is left as it is"
            );
        }
        let mut settings: Vec<_> =
            self.settings.iter().filter_map(|(name, value)| Some((order(name)?, (&**name, &**value)))).collect();
        settings.sort();
        let settings = settings.into_iter().map(|(_, setting)| setting).collect();
        let mut ip = String::new();
        if self.mtu != 0 && self.mtu != 1500 {
            ip += &format!("link set {INSIDE} mtu {}\n", self.mtu);
        }
        let has_route: Vec<_> = (!route.is_empty()).then_some(route).into_iter().collect();
        if self.addresses.iter().collect::<Vec<_>>() != [address] || self.routes.iter().collect::<Vec<_>>() != has_route
        {
            // Routes over them go with them.
            ip += &format!("address flush dev {INSIDE} scope {SCOPE_GLOBAL}\n");
            ip.extend(self.addresses.iter().map(|words| format!("address replace {}\n", words.join(" "))));
            ip.extend(self.routes.iter().map(|words| format!("route replace {}\n", words.join(" "))));
        }
        Orders { settings, ip, nft: &self.nftables }
    }
}

/// Whether what the state `layer` says of a network, if it says anything, would be refused at a restore: why.
///
/// # Errors
/// Those of the store; also if it isn't here yet.
pub(crate) fn refusal(store: &Arc<Store>, layer: LayerId) -> crate::error::Result<Option<String>> {
    let view = View::open(store, layer)?;
    let Some((ino, _)) = view.lookup(Ino::ROOT, FILE.as_bytes())? else { return Ok(None) };
    // So much that a longer one is seen to be that.
    let size = view.stat(ino)?.map_or(0, |stat| stat.size);
    let mut json = vec![0; size.min(MAX_BYTES as u64 + 1) as usize];
    let read = view.read_at(ino, 0, &mut json)?;
    Ok(NetworkSetup::parse(&json[..read]).err())
}

/// Has a thread in `namespace` do `work`: it stays there.
fn within<T: Send>(namespace: &Path, work: impl FnOnce() -> Outcome<T> + Send) -> Outcome<T> {
    let file = File::open(namespace).map_err(|error| format!("cannot open {}: {error}", namespace.display()))?;
    let done = std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
                .map_err(|error| format!("cannot enter {}: {error}", namespace.display()))?;
            work()
        });
        thread.join()
    });
    done.unwrap_or_else(|_| Err("the thread panicked".to_owned()))
}

fn known_settings() -> impl Iterator<Item = String> {
    let interfaces = ["all", "default", "lo", INSIDE];
    let each = interfaces
        .into_iter()
        .flat_map(|interface| INTERFACE_SETTINGS.into_iter().map(move |name| name.replace('*', interface)));
    SETTINGS.into_iter().map(str::to_owned).chain(each)
}

/// The settings of the namespace that this thread is in.
fn settings() -> BTreeMap<String, String> {
    let read = |name: String| {
        let value = fs::read_to_string(Path::new("/proc/sys/net").join(&name)).ok()?;
        Some((name, value.trim().to_owned()))
    };
    known_settings().filter_map(read).collect()
}

/// Has `set` see to all `settings`, as far as it can. Some can be as they are to be only after others that come later, and some set others:
/// if one fails, all are seen to once more. Returns those that fail then, and why.
fn settle<'a>(
    settings: &[(&'a str, &'a str)],
    set: impl Fn(&str, &str) -> Outcome<()>,
) -> Vec<(&'a str, &'a str, String)> {
    let failed = || -> Vec<_> {
        let tried = settings.iter().map(|(name, value)| Some((*name, *value, set(name, value).err()?)));
        tried.flatten().collect()
    };
    if failed().is_empty() { Vec::new() } else { failed() }
}

/// Has a setting of the namespace that this thread is in be `value`. One that is so needn't be one that can be written here.
fn set(name: &str, value: &str) -> Outcome<()> {
    let path = Path::new("/proc/sys/net").join(name);
    match fs::read_to_string(&path) {
        Ok(now) if now.trim() == value => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Err("this kernel doesn't know it".to_owned()),
        _ => fs::write(&path, value).map_err(|error| format!("cannot write {}: {error}", path.display())),
    }
}

fn in_utc(nft: PathBuf) -> Command {
    let mut command = Command::new(nft);
    command.env("TZ", "UTC");
    command
}

/// What `ip -j` says, however many lists it makes of it.
fn items(text: &[u8]) -> Outcome<Vec<Value>> {
    let lists = serde_json::Deserializer::from_slice(text).into_iter::<Vec<Value>>();
    let lists: Result<Vec<_>, _> = lists.collect();
    Ok(lists.map_err(|error| format!("what `ip` says isn't understood: {error}"))?.into_iter().flatten().collect())
}

/// What `ip address add` is to be told of an address; nothing of those that the kernel makes by itself.
fn address_words(device: &str, address: &Value) -> Option<Vec<String>> {
    let text = |key: &str| address[key].as_str().map(str::to_owned);
    let (local, scope, length) = (text("local")?, plain(&address["scope"])?, address["prefixlen"].as_u64()?);
    let is_six = address["family"] == "inet6";
    let is_usual = device == "lo" && matches!((&*local, length), ("127.0.0.1", 8) | ("::1", 128));
    if is_usual || is_six && number(&address["scope"]) == Some(SCOPE_LINK) {
        return None;
    }
    let mut words = match text("address") {
        Some(peer) => vec![local, "peer".to_owned(), format!("{peer}/{length}")],
        None => vec![format!("{local}/{length}")],
    };
    let mut put = |key: &str, value: String| words.extend([key.to_owned(), value]);
    put("dev", device.to_owned());
    put("scope", scope);
    for (key, option) in [("broadcast", "broadcast"), ("label", "label"), ("metric", "metric")] {
        if let Some(value) = plain(&address[key]).filter(|value| value != device) {
            put(option, value);
        }
    }
    for (key, option) in [("valid_life_time", "valid_lft"), ("preferred_life_time", "preferred_lft")] {
        if let Some(seconds) = address[key].as_u64().filter(|seconds| *seconds != u64::from(u32::MAX)) {
            put(option, seconds.to_string());
        }
    }
    if address["noprefixroute"] == true {
        words.push("noprefixroute".to_owned());
    }
    if is_six {
        // It has been looked for others with that address; one that may still be another's can't be used by what is restored.
        words.push("nodad".to_owned());
    }
    Some(words)
}

/// Whether it is a rule for routes that the kernel makes by itself. An old `ip` doesn't say who has made it.
fn is_usual_rule(rule: &Value) -> bool {
    let table = number(&rule["table"]);
    let is_one = |(priority, usual)| rule["priority"] == priority && table == Some(usual) && rule["src"] == "all";
    number(&rule["protocol"]) == Some(BY_KERNEL)
        || rule["protocol"].is_null()
            && [(0, TABLE_LOCAL), (32766, TABLE_MAIN), (32767, TABLE_DEFAULT)].into_iter().any(is_one)
}

/// What of a route `ip route add` is told as `ip -j` says it, and what it is called there.
const ROUTE_WORDS: [(&str, &str); 10] = [
    ("src", "from"),
    ("tos", "tos"),
    ("gateway", "via"),
    ("dev", "dev"),
    ("table", "table"),
    ("protocol", "protocol"),
    ("scope", "scope"),
    ("metric", "metric"),
    ("prefsrc", "src"),
    ("expires", "expires"),
];
/// What a route can be, by numbers from one on.
const ROUTE_TYPES: [&str; 9] =
    ["unicast", "local", "broadcast", "anycast", "multicast", "blackhole", "unreachable", "prohibit", "throw"];
/// The same of its metrics, which are numbers there too.
const METRICS: [&str; 8] = ["mtu", "advmss", "window", "cwnd", "initcwnd", "initrwnd", "reordering", "hoplimit"];
/// What else may be said of one; what isn't known can't be carried.
const OTHERS: [&str; 7] = ["type", "dst", "via", "flags", "metrics", "pref", "nexthops"];

/// The kind of a route.
fn route_type(route: &Value) -> Option<&str> {
    let Some(said) = route["type"].as_str() else { return Some(ROUTE_TYPES[0]) };
    match number(&route["type"]) {
        Some(number) => ROUTE_TYPES.get((number as usize).checked_sub(1)?).copied(),
        None => Some(said),
    }
}

/// Whether a route comes by itself. `makes_ra` says whether those come so that a router has advertised; else a program of the guest's has
/// made them.
fn is_by_itself(route: &Value, makes_ra: bool) -> bool {
    let is_by = match number(&route["protocol"]) {
        Some(BY_KERNEL | BY_REDIRECT) => true,
        Some(BY_RA) => makes_ra,
        _ => false,
    };
    // Older kernels say of that one that it was made by hand.
    let is_of_groups = route["dst"] == "ff00::/8" && number(&route["table"]) == Some(TABLE_LOCAL);
    is_by || is_of_groups || route_type(route) == Some("multicast")
}

/// What `ip route add` is to be told of a route. Fails by what of it can't be told.
fn route_words(route: &Value) -> Result<Vec<String>, String> {
    let unknown = |key: &str| format!("{key:?}, which isn't known here");
    let known = |key: &&String| OTHERS.contains(&key.as_str()) || ROUTE_WORDS.iter().any(|(known, _)| known == key);
    if let Some(key) = route.as_object().into_iter().flat_map(|route| route.keys()).find(|key| !known(key)) {
        return Err(unknown(key));
    }
    // Only of those of IPv6 it is said whether they are preferred.
    let destination = match route["dst"].as_str().unwrap_or_default() {
        "default" if route["pref"].is_string() => "::/0",
        destination => destination,
    };
    let kind = route_type(route).ok_or_else(|| unknown("type"))?;
    let mut words = vec![kind.to_owned(), destination.to_owned()];
    for (key, option) in ROUTE_WORDS {
        if let Some(value) = plain(&route[key]) {
            words.extend([option.to_owned(), value]);
        }
    }
    words.extend(way_words(route));
    for (key, value) in route["metrics"].as_array().into_iter().flatten().filter_map(Value::as_object).flatten() {
        let value = plain(value).filter(|_| METRICS.contains(&key.as_str())).ok_or_else(|| unknown(key))?;
        words.extend([key.clone(), value]);
    }
    for hop in route["nexthops"].as_array().into_iter().flatten() {
        words.push("nexthop".to_owned());
        for (key, option) in [("gateway", "via"), ("dev", "dev"), ("weight", "weight")] {
            if let Some(value) = plain(&hop[key]) {
                words.extend([option.to_owned(), value]);
            }
        }
        words.extend(way_words(hop));
    }
    check_route(&words).map_err(unknown)?;
    Ok(words)
}

/// A gateway of another kind of addresses, and that it is a neighbour.
fn way_words(way: &Value) -> Vec<String> {
    let mut words = Vec::new();
    if let (Some(family), Some(host)) = (way["via"]["family"].as_str(), way["via"]["host"].as_str()) {
        words.extend(["via".to_owned(), family.to_owned(), host.to_owned()]);
    }
    if way["flags"].as_array().is_some_and(|flags| flags.iter().any(|flag| flag == "onlink")) {
        words.push("onlink".to_owned());
    }
    words
}

fn plain(value: &Value) -> Option<String> {
    value.as_str().map(str::to_owned).or_else(|| value.as_u64().map(|number| number.to_string()))
}

fn number(value: &Value) -> Option<u64> {
    plain(value)?.parse().ok()
}

/// Whether words are what [`address_words`] makes: fails by the first that isn't.
fn check_address(words: &[String]) -> Result<(), &str> {
    let mut words = words.iter().map(String::as_str);
    let address = words.next().unwrap_or_default();
    if !is_prefix(address) {
        return Err(address);
    }
    while let Some(option) = words.next() {
        let value = match option {
            "noprefixroute" | "nodad" => continue,
            "peer" | "dev" | "scope" | "broadcast" | "label" | "metric" | "valid_lft" | "preferred_lft" => words.next(),
            _ => return Err(option),
        };
        check_value(option, value)?;
    }
    Ok(())
}

/// The same of [`route_words`].
fn check_route(words: &[String]) -> Result<(), &str> {
    let mut words = words.iter().map(String::as_str);
    let (kind, destination) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    if !ROUTE_TYPES.contains(&kind) {
        return Err(kind);
    }
    if destination != "default" && !is_prefix(destination) {
        return Err(destination);
    }
    let is_option = |word: &str| {
        word == "weight" || METRICS.contains(&word) || ROUTE_WORDS.iter().any(|(_, option)| *option == word)
    };
    while let Some(option) = words.next() {
        let value = match option {
            "onlink" | "nexthop" => continue,
            option if is_option(option) => words.next(),
            option => return Err(option),
        };
        let is_family = option == "via" && matches!(value, Some("inet" | "inet6"));
        check_value(option, if is_family { words.next() } else { value })?;
    }
    Ok(())
}

/// Whether `value` is one of that option's of an address or a route, so that the next word is an option again.
fn check_value<'a>(option: &'a str, value: Option<&'a str>) -> Result<(), &'a str> {
    let value = value.ok_or(option)?;
    let is_value = match option {
        "via" | "src" | "broadcast" => value.parse::<IpAddr>().is_ok(),
        "from" | "peer" => is_prefix(value),
        "dev" | "label" => {
            !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._:-".contains(&byte))
        }
        _ => {
            let (digits, base) = value.strip_prefix("0x").map_or((value, 10), |digits| (digits, 16));
            !digits.is_empty() && digits.chars().all(|digit| digit.is_digit(base))
        }
    };
    if is_value { Ok(()) } else { Err(value) }
}

/// Whether it is an address, or one with a length.
fn is_prefix(word: &str) -> bool {
    let (address, length) = word.split_once('/').unwrap_or((word, "0"));
    address.parse::<IpAddr>().is_ok() && length.len() <= 3 && length.parse::<u8>().is_ok_and(|length| length <= 128)
}

/// What a namespace has that was made with `address`, and `gateway` as the way out.
pub(super) fn made(address: &str, gateway: Option<IpAddr>) -> [Vec<String>; 2] {
    let words = |text: String| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
    let route = gateway.map(|gateway| {
        words(format!(
            "unicast default via {gateway} dev {INSIDE} table {TABLE_MAIN} protocol {BY_BOOT} scope {SCOPE_GLOBAL}"
        ))
    });
    [words(format!("{address} dev {INSIDE} scope {SCOPE_GLOBAL}")), route.unwrap_or_default()]
}

/// The tables in a ruleset, each with its lines and what it is called.
fn tables(ruleset: &str) -> impl Iterator<Item = (&str, &str)> {
    // A table's end is a line of its own, and so are those of what is in it, but further in.
    ruleset.split_inclusive("\n}\n").filter_map(|table| {
        let at = if table.starts_with("table ") { 0 } else { table.find("\ntable ")? + 1 };
        let head = table[at..].lines().next()?;
        Some((head.strip_prefix("table ")?.split(" {").next()?, table))
    })
}

fn is_of_criu(name: &str) -> bool {
    name == CRIU || name.strip_prefix(CRIU).is_some_and(|rest| rest.starts_with('-'))
}

/// The same of a table's family and name.
fn is_lock(table: &str) -> bool {
    is_of_criu(table.split(' ').nth(1).unwrap_or_default())
}

/// Whether a table's family and name are nothing more where `nft` reads them; the kernel takes any name.
fn is_plain_table(table: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-".contains(&byte);
    table.split_once(' ').is_some_and(|(family, name)| [family, name].iter().all(|word| word.bytes().all(is_plain)))
}

fn tables_of_criu(ruleset: &str) -> impl Iterator<Item = &str> {
    tables(ruleset).map(|(name, _)| name).filter(|name| is_lock(name))
}

/// The ruleset without CRIU's locks, also those by which it locks with the help of iptables: a chain, and the ways into it.
fn without_criu(ruleset: &str) -> String {
    let kept: String = tables(ruleset).filter(|(name, _)| !is_lock(name)).map(|(_, table)| table).collect();
    let (begin, way) = (format!("\tchain {CRIU} {{\n"), format!(" jump {CRIU}\n"));
    if !kept.contains(&begin) {
        return kept;
    }
    let mut is_inside = false;
    let lines = kept.split_inclusive('\n').filter(|line| {
        let was_inside = is_inside || *line == begin;
        is_inside = was_inside && *line != "\t}\n";
        !was_inside && !line.ends_with(&way)
    });
    lines.collect()
}

/// Whether it has rules that `nft` shows and can't read: extensions of iptables.
fn is_foreign(ruleset: &str) -> bool {
    ["xt match \"", "xt target \"", "# xt_"].iter().any(|sign| ruleset.contains(sign))
}

/// Whether `nft` may read a ruleset: fails by what is wrong with it. It neither reads other files nor has words that stand for others,
/// which `nft` itself never writes.
fn check_ruleset(ruleset: &str) -> Result<(), String> {
    if ruleset.len() > MAX_RULESET {
        return Err(format!("an nftables ruleset of more than {MAX_RULESET} bytes"));
    }
    if begins_an_order("include", ruleset) {
        return Err("an nftables ruleset that would read other files".to_owned());
    }
    if ["define", "redefine", "undefine"].iter().any(|word| begins_an_order(word, ruleset)) || has_variable(ruleset) {
        return Err("an nftables ruleset with variables".to_owned());
    }
    Ok(())
}

/// Whether `word` stands where an order of `nft`'s begins. In a comment it may stand.
fn begins_an_order(word: &str, ruleset: &str) -> bool {
    ruleset.match_indices(word).any(|(at, word)| {
        let before = ruleset[..at].trim_end_matches(|c: char| c != '\n' && c.is_whitespace());
        let goes_on = |c: char| c.is_ascii_alphanumeric() || c == '_';
        (before.is_empty() || before.ends_with(['\n', ';', '{', '}']))
            && !ruleset[at + word.len()..].starts_with(goes_on)
    })
}

/// Whether there is a `$` outside of quotes. Comments to a line's end have no quotes.
fn has_variable(ruleset: &str) -> bool {
    let (mut is_quoted, mut is_comment) = (false, false);
    ruleset.bytes().any(|byte| {
        match byte {
            b'\n' => is_comment = false,
            b'#' if !is_quoted => is_comment = true,
            b'"' if !is_comment => is_quoted = !is_quoted,
            _ => {}
        }
        byte == b'$' && !is_quoted
    })
}

#[cfg(test)]
mod tests {
    use layerfs::LayerName;
    use layerfs::monitor::Silent;
    use layerfs::store::StoreOptions;

    use super::super::state;
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split('|').map(str::to_owned).collect()
    }

    #[test]
    fn what_a_state_brings_is_about_the_guests_network_and_nothing_else() {
        let is_taken = |setup: NetworkSetup| NetworkSetup::parse(&serde_json::to_vec(&setup).unwrap()).is_ok();
        let takes_address = |text: &str| is_taken(NetworkSetup { addresses: vec![words(text)], ..Default::default() });
        let takes_route = |text: &str| is_taken(NetworkSetup { routes: vec![words(text)], ..Default::default() });
        for fine in [
            "10.7.0.2/24|dev|eth0",
            "10.7.0.2|peer|10.7.0.3/32|dev|eth0|scope|253|broadcast|10.7.0.255|label|eth0:1|metric|5",
            "fd00::2/64|dev|lo|scope|0|valid_lft|600|preferred_lft|300|noprefixroute|nodad",
        ] {
            assert!(takes_address(fine), "{fine}");
        }
        for fine in [
            "unicast|default|via|10.7.0.1|dev|eth0|table|254|protocol|3|scope|0",
            "unicast|fd01::/64|from|fd00::/64|via|fd00::9|metric|1024|expires|600",
            "unicast|10.25.0.0/16|tos|0x10|dev|eth0|src|10.7.0.2|via|inet6|fd00::9|onlink|mtu|1400",
            "unicast|10.11.0.0/16|nexthop|via|10.7.0.3|weight|2|nexthop|via|inet6|fd00::9|dev|eth0|weight|1|onlink",
            "blackhole|10.10.0.0/16|table|77",
        ] {
            assert!(takes_route(fine), "{fine}");
        }
        for bad in ["10.0.0.1\nnetns exec x sh", "", "a b", "10.0.0.1;", "\"x\"", "x\\", "10.0.0.1/x", "-force"] {
            assert!(!takes_address(bad) && !takes_route(&format!("unicast|{bad}")) && !takes_route(bad), "{bad:?}");
        }
        for bad in ["dev", "dev|", "dev|a b", "home", "scope|link", "label|x|y", "via|10.7.0.1", "metric|nodad"] {
            assert!(!takes_address(&format!("10.7.0.2/24|{bad}")), "{bad}");
        }
        for bad in [
            "encap|bpf|in|obj|/tmp/x.o|sec|x",
            "via|10.7.0.1|encap|bpf|in|pinned|/x",
            "nexthop|encap|mpls|7",
            "via|inet",
            "via|encap|10.7.0.1",
            "via|link|eth0",
            "via",
            "mtu|lock",
            "mtu|lock|1400",
            "congctl|x",
            "table|main",
            "nhid|7",
            "nodad",
        ] {
            assert!(!takes_route(&format!("unicast|10.9.0.0/16|{bad}")), "{bad}");
        }
        assert!(!takes_route("encap|10.9.0.0/16"));
        let long = format!("table ip x {{\n\tcomment \"{}\"\n}}\n", "x".repeat(MAX_RULESET));
        for (text, is_fine) in [
            ("table ip x {\n\tcomment \"include all\"\n}\n", true),
            ("table ip x {\n\tcomment \"we include 'all'\"\n}\n", true),
            ("include \"/etc/shadow\"\n", false),
            ("# \"\ninclude \\\n \"/etc/shadow\"\n", false),
            ("table ip x { \t include \"/etc/shadow\"\n}\n", false),
            ("table ip x {\n}\ninclude\"/etc/shadow\"\n", false),
            ("table ip x {\n}\n;include '/etc/shadow'\n", false),
            ("table ip x {\n\tcomment \"5 $, defined\"\n\tset definer {\n\t}\n}\n", true),
            ("define x = 1\n", false),
            ("table ip x {\n\tdefine x = 1\n}\n", false),
            ("redefine x = 1\n", false),
            ("table ip $x {\n}\n", false),
            ("# \"\ntable ip $x {\n}\n", false),
            ("table ip x {\n\tcomment \"#\"\n\tset $y {\n\t}\n}\n", false),
            (&*long, false),
        ] {
            let setup = NetworkSetup { nftables: text.to_owned(), ..NetworkSetup::default() };
            assert_eq!(is_taken(setup), is_fine, "{}", &text[..text.len().min(99)]);
        }
    }

    #[test]
    fn what_a_state_brings_is_looked_at_before_it_is_restored() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("store"), StoreOptions::create()).unwrap();
        let refused = |text: &str| {
            let from = tempfile::tempdir().unwrap();
            fs::write(from.path().join("dump.img"), "x").unwrap();
            if !text.is_empty() {
                fs::write(from.path().join(FILE), text).unwrap();
            }
            let name = LayerName::new("guest/web/state").unwrap();
            let (layer, _) = state::import(&store, from.path(), &name, None, &Silent).unwrap();
            refusal(&store, layer).unwrap()
        };
        assert_eq!([refused(""), refused("{\"mtu\": 1400}")], [None, None]);
        assert!(refused("{\"routes\": [[\"unicast\", \"default\", \"encap\", \"bpf\"]]}").unwrap().contains("encap"));
        assert!(refused("{\"of_later\": 1}").unwrap().contains("later version"));
        assert!(refused(&" ".repeat(MAX_BYTES + 1)).unwrap().contains("longer"));
    }

    #[test]
    fn only_known_settings_are_taken_from_a_state() {
        let made = made("10.7.0.2/24", None);
        let with = |settings: &[(&str, &str)]| NetworkSetup {
            settings: settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect(),
            ..NetworkSetup::default()
        };
        let unknown = with(&[
            ("../kernel/core_pattern", "|x"),
            ("ipv4//x", "1"),
            ("/ipv4/x", "1"),
            ("ipv4", "1"),
            ("ipv4/tcp_allowed_congestion_control", "x"),
            ("ipv4/conf/eth1/rp_filter", "1"),
        ]);
        assert_eq!(unknown.orders(&made).settings, []);
        assert!(with(&[("ipv4/ip_forward", "1\nx")]).check().is_err());
        assert!(unknown.check().is_ok());
        // Forwarding sets others.
        let both = with(&[("ipv4/conf/all/send_redirects", "0"), ("ipv4/ip_forward", "1")]);
        let settings = both.orders(&made).settings;
        assert_eq!(settings, [("ipv4/ip_forward", "1"), ("ipv4/conf/all/send_redirects", "0")]);
    }

    #[test]
    fn a_setting_that_fails_is_tried_once_more_after_the_others_and_named() {
        let done = std::cell::RefCell::new(Vec::new());
        // As the kernel does: ports that are given out may not be less than those that want a right.
        let set = |name: &str, _: &str| {
            let is_refused = name == "never" || name == "ports" && !done.borrow().contains(&"start".to_owned());
            if is_refused {
                return Err("no".to_owned());
            }
            done.borrow_mut().push(name.to_owned());
            Ok(())
        };
        assert_eq!(settle(&[("never", "1"), ("ports", "10"), ("start", "5")], set), [("never", "1", "no".to_owned())]);
        assert_eq!(*done.borrow(), ["start", "ports", "start"]);
        done.borrow_mut().clear();
        assert_eq!(settle(&[("start", "5"), ("ports", "10")], set), []);
        assert_eq!(*done.borrow(), ["start", "ports"], "and not without need");
    }

    #[test]
    fn tables_of_criu_are_told_from_the_guests() {
        let guests = "# Warning: table ip filter is managed by iptables-nft, do not touch!\ntable ip filter {\n\tchain x {\n\t}\n}\n";
        let ruleset = format!("table inet CRIU-12 {{\n\tchain output {{\n\t}}\n}}\n{guests}table inet CRIUX {{\n}}\n");
        assert_eq!(tables_of_criu(&ruleset).collect::<Vec<_>>(), ["inet CRIU-12"]);
        assert_eq!(without_criu(&ruleset), format!("{guests}table inet CRIUX {{\n}}\n"));
        let locked = "table ip filter {\n\tchain CRIU {\n\t\tmeta mark 0xc114 accept\n\t\tcounter drop\n\t}\n\n\tchain INPUT {\n\t\tcounter jump CRIU\n\t\t\
                      tcp dport 1 drop\n\t}\n}\n";
        assert_eq!(
            without_criu(locked),
            "table ip filter {\n\n\tchain INPUT {\n\t\ttcp dport 1 drop\n\t}\n}\n",
            "the lock of a CRIU that does it by iptables"
        );
        assert!(is_plain_table("inet CRIU-12"));
        for bad in ["inet", "inet CRIU-1;", "inet CRIU-1 x", "inet CRIU-$x", "inet CRIU-\\"] {
            assert!(!is_plain_table(bad), "{bad}");
        }
        assert!(!is_foreign(guests) && is_foreign("\t\txt match \"comment\" counter"));
    }

    #[test]
    fn a_route_of_which_something_isnt_known_isnt_carried() {
        let route =
            serde_json::json!({ "type": "unicast", "dst": "10.9.0.0/16", "gateway": "10.7.0.9", "flags": ["onlink"] });
        assert_eq!(route_words(&route).unwrap(), ["unicast", "10.9.0.0/16", "via", "10.7.0.9", "onlink"]);
        for (key, value, sign) in
            [("nhid", 7.into(), "nhid"), ("type", "12".into(), "type"), ("dev", "a b".into(), "a b")]
        {
            let mut other: Value = route.clone();
            other[key] = value;
            assert!(route_words(&other).unwrap_err().contains(sign), "{key}");
        }
    }

    #[test]
    fn routes_that_come_by_themselves_are_told_by_numbers() {
        let route = |key: &str, value: &str| {
            let mut route =
                serde_json::json!({ "type": "1", "dst": "fd01::/64", "table": "254", "protocol": "3", "scope": "0" });
            route[key] = value.into();
            route
        };
        assert!(!is_by_itself(&route("protocol", "3"), true));
        // A host may call them anything.
        for (protocol, makes_ra, is_by) in
            [("2", false, true), ("1", false, true), ("9", true, true), ("9", false, false), ("kernel", true, false)]
        {
            assert_eq!(is_by_itself(&route("protocol", protocol), makes_ra), is_by, "{protocol}");
        }
        let mut groups = route("dst", "ff00::/8");
        assert!(!is_by_itself(&groups, true));
        groups["table"] = "255".into();
        assert!(is_by_itself(&groups, true), "older kernels' is no multicast route, and nobody's");
        assert!(is_by_itself(&route("type", "5"), true));
        assert_eq!(route_words(&route("type", "6")).unwrap()[..2], ["blackhole", "fd01::/64"]);
        let rule =
            |priority: u64, table: &str| serde_json::json!({ "priority": priority, "src": "all", "table": table });
        assert!(
            is_usual_rule(&rule(0, "255")) && is_usual_rule(&rule(32766, "254")) && !is_usual_rule(&rule(0, "254"))
        );
        let mut kernels = rule(7, "77");
        kernels["protocol"] = "2".into();
        assert!(is_usual_rule(&kernels));
    }
}
