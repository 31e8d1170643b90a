//! What a guest has set up in its own network beside what [`super::network`] makes there: addresses, routes, nftables, settings. It goes
//! along with the guest's state, in a file of its own.
//!
//! Hides the words of `ip` and `nft`. Invariants: what can't be carried is named, before a move and again at the dump, and never left
//! behind in silence; of what a state brings nothing reaches a program that isn't about the guest's own network.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Obstacle;
use super::network::INSIDE;
use super::nftables::table_names;
use super::programs::{Programs, run, run_with};

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
        if read.stdout.len() > MAX_BYTES {
            return Err(format!("{FILE} of its state is longer than {MAX_BYTES} bytes"));
        }
        let setup: NetworkSetup = serde_json::from_slice(&read.stdout)
            .map_err(|error| format!("{FILE} of its state can't be read, it may be of a later version: {error}"))?;
        let [settings, ip, nft] = setup.orders(made)?;
        within(&self.namespace, || {
            for line in settings.lines() {
                let (name, value) = line.split_once('=').unwrap_or((line, ""));
                set(name, value)?;
            }
            if !ip.is_empty() {
                run_with(Command::new(self.program("ip", "iproute2")?).args(["-batch", "-"]), ip.as_bytes())?;
            }
            if !nft.is_empty() {
                run_with(Command::new(self.program("nft", "nftables")?).args(["-f", "-"]), nft.as_bytes())?;
            }
            Ok(())
        })
        .map_err(|error| format!("what it had set up in its network can't be set up here: {error}"))
    }

    /// What is set up there and wouldn't go along.
    pub fn obstacles(&self) -> Vec<Obstacle> {
        let found = self.look().map(|(setup, mut found)| {
            if !setup.nftables.is_empty()
                && let Err(error) = within(&self.namespace, || {
                    let nft = self.program("nft", "nftables")?;
                    run_with(Command::new(nft).args(["-c", "-f", "-"]), setup.nftables.as_bytes())
                })
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
            let lines: String = tables_of_criu(&ruleset).map(|table| format!("delete table {table}\n")).collect();
            if !lines.is_empty() {
                run_with(Command::new(self.program("nft", "nftables")?).args(["-f", "-"]), lines.as_bytes())?;
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
                    run_with(Command::new(&ip).args(["-d", "-j", "-batch", "-"]), lines)
                });
                let rules =
                    scope.spawn(|| run(Command::new(&ip).args(["-6", "-d", "-j", "rule"]).stdin(Stdio::null())));
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
                if setup.nftables.len() > MAX_RULESET {
                    let fix = self.remedy(
                        "nft list ruleset",
                        "shows it: have what is long in it made by a hook, `after-restore`",
                    );
                    found.push((format!("an nftables ruleset of more than {MAX_RULESET} bytes"), fix));
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
            setup.addresses.extend(addresses.filter_map(|address| address_words(device, address)));
        } else if item["dst"].is_string() && item["priority"].is_null() {
            match route_words(item) {
                Ok(words) => setup.routes.extend(words),
                Err(what) => {
                    let destination = item["dst"].as_str().unwrap_or_default();
                    let what = format!("a route to {destination} with {what}");
                    found.push((what, self.remedy("ip route", "shows it: write it otherwise, or remove it")));
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
        match run(Command::new(nft).args(["list", "ruleset"]).stdin(Stdio::null())) {
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

impl NetworkSetup {
    /// What is to be done for it where what `made` says is there: settings, lines for `ip`, and what `nft` reads.
    pub(super) fn orders(&self, made: &[Vec<String>; 2]) -> Outcome<[String; 3]> {
        let [address, route] = made;
        let words = self.addresses.iter().chain(&self.routes).flatten();
        if let Some(word) = words.clone().find(|word| !is_word(word)) {
            return Err(format!("{word:?} in {FILE} of its state is no part of an address or a route"));
        }
        if includes(&self.nftables) {
            return Err(format!("the nftables ruleset in {FILE} of its state would read other files"));
        }
        let is_setting = |name: &str| {
            let is_part = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
            name.contains('/') && name.split('/').all(is_part)
        };
        let mut settings = String::new();
        // Those that aren't known here come last.
        let order = |name: &str| known_settings().position(|known| known == name).unwrap_or(usize::MAX);
        let mut sorted: Vec<_> = self.settings.iter().collect();
        sorted.sort_by_key(|(name, _)| order(name));
        for (name, value) in sorted {
            if !is_setting(name) || value.contains('\n') {
                return Err(format!("{name:?} in {FILE} of its state is no setting of a network"));
            }
            settings += &format!("{name}={value}\n");
        }
        let mut ip = String::new();
        if self.mtu != 0 && self.mtu != 1500 {
            ip += &format!("link set {INSIDE} mtu {}\n", self.mtu);
        }
        let has_route: Vec<_> = (!route.is_empty()).then_some(route).into_iter().collect();
        if self.addresses.iter().collect::<Vec<_>>() != [address] || self.routes.iter().collect::<Vec<_>>() != has_route
        {
            // Routes over them go with them.
            ip += &format!("address flush dev {INSIDE} scope global\n");
            ip.extend(self.addresses.iter().map(|words| format!("address replace {}\n", words.join(" "))));
            ip.extend(self.routes.iter().map(|words| format!("route replace {}\n", words.join(" "))));
        }
        Ok([settings, ip, self.nftables.clone()])
    }
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

/// Has a setting of the namespace that this thread is in be `value`.
fn set(name: &str, value: &str) -> Outcome<()> {
    let path = Path::new("/proc/sys/net").join(name);
    match fs::read_to_string(&path) {
        Ok(now) if now.trim() == value => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            tracing::warn!(name, value, "a setting of a guest's network isn't known to this kernel");
            Ok(())
        }
        _ => fs::write(&path, value).map_err(|error| format!("cannot write {value:?} to {}: {error}", path.display())),
    }
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
    let (local, scope, length) = (text("local")?, text("scope")?, address["prefixlen"].as_u64()?);
    let is_six = address["family"] == "inet6";
    let is_usual = device == "lo" && matches!((&*local, length), ("127.0.0.1", 8) | ("::1", 128));
    if is_usual || is_six && scope == "link" {
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
        let value = text(key).or_else(|| address[key].as_u64().map(|number| number.to_string()));
        if let Some(value) = value.filter(|value| value != device) {
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
    let is_one = |(priority, table)| rule["priority"] == priority && rule["table"] == table && rule["src"] == "all";
    rule["protocol"] == "kernel"
        || rule["protocol"].is_null() && [(0, "local"), (32766, "main"), (32767, "default")].into_iter().any(is_one)
}

/// What of a route `ip route add` is told as `ip -j` says it, and what it is called there.
const ROUTE_WORDS: [(&str, &str); 9] = [
    ("src", "from"),
    ("tos", "tos"),
    ("gateway", "via"),
    ("dev", "dev"),
    ("table", "table"),
    ("protocol", "protocol"),
    ("scope", "scope"),
    ("metric", "metric"),
    ("prefsrc", "src"),
];
/// The same of its metrics, which are numbers there too.
const METRICS: [&str; 8] = ["mtu", "advmss", "window", "cwnd", "initcwnd", "initrwnd", "reordering", "hoplimit"];
/// What else may be said of one; what isn't known can't be carried.
const OTHERS: [&str; 7] = ["type", "dst", "via", "flags", "metrics", "pref", "nexthops"];

/// What `ip route add` is to be told of a route; nothing of those that come by themselves. Fails by what of it can't be told.
fn route_words(route: &Value) -> Result<Option<Vec<String>>, String> {
    if matches!(route["protocol"].as_str(), Some("kernel" | "ra" | "redirect")) || route["type"] == "multicast" {
        return Ok(None);
    }
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
    let mut words = vec![route["type"].as_str().unwrap_or("unicast").to_owned(), destination.to_owned()];
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
    Ok(Some(words))
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

/// What a namespace has that was made with `address`, and `gateway` as the way out.
pub(super) fn made(address: &str, gateway: Option<std::net::IpAddr>) -> [Vec<String>; 2] {
    let words = |text: String| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
    let route = gateway.map(|gateway| {
        words(format!("unicast default via {gateway} dev {INSIDE} table main protocol boot scope global"))
    });
    [words(format!("{address} dev {INSIDE} scope global")), route.unwrap_or_default()]
}

/// Whether it can be a part of an address or a route, and nothing but one.
fn is_word(word: &str) -> bool {
    !word.is_empty() && word.bytes().all(|b| b.is_ascii_alphanumeric() || b"._:/-".contains(&b))
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

/// Whether it would have `nft` read another file: whether the word for it stands where an order begins. In a comment it may stand.
fn includes(ruleset: &str) -> bool {
    ruleset.match_indices("include").any(|(at, word)| {
        let before = ruleset[..at].trim_end_matches(|c: char| c != '\n' && c.is_whitespace());
        let goes_on = |c: char| c.is_ascii_alphanumeric() || c == '_';
        (before.is_empty() || before.ends_with(['\n', ';', '{', '}']))
            && !ruleset[at + word.len()..].starts_with(goes_on)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_state_brings_is_about_the_guests_network_and_nothing_else() {
        let made = made("10.7.0.2/24", None);
        let orders = |setup: &NetworkSetup| setup.orders(&made);
        let words = |text: &str| vec![text.split('|').map(str::to_owned).collect::<Vec<_>>()];
        assert!(orders(&NetworkSetup { addresses: words("10.7.0.2/24|dev|eth0"), ..NetworkSetup::default() }).is_ok());
        for bad in ["10.0.0.1\nnetns exec x sh", "", "a b", "10.0.0.1;", "\"x\"", "x\\"] {
            assert!(orders(&NetworkSetup { addresses: words(bad), ..NetworkSetup::default() }).is_err(), "{bad:?}");
            assert!(orders(&NetworkSetup { routes: words(bad), ..NetworkSetup::default() }).is_err(), "{bad:?}");
        }
        for (name, value) in [
            ("../kernel/core_pattern", "|x"),
            ("ipv4//x", "1"),
            ("/ipv4/x", "1"),
            ("ipv4", "1"),
            ("ipv4/x", "1\nipv4/y=2"),
        ] {
            let settings = [(name.to_owned(), value.to_owned())].into();
            assert!(orders(&NetworkSetup { settings, ..NetworkSetup::default() }).is_err(), "{name:?}");
        }
        for (text, is_fine) in [
            ("table ip x {\n\tcomment \"include all\"\n}\n", true),
            ("table ip x {\n\tcomment \"we include 'all'\"\n}\n", true),
            ("include \"/etc/shadow\"\n", false),
            ("# \"\ninclude \\\n \"/etc/shadow\"\n", false),
            ("table ip x { \t include \"/etc/shadow\"\n}\n", false),
            ("table ip x {\n}\ninclude\"/etc/shadow\"\n", false),
            ("table ip x {\n}\n;include '/etc/shadow'\n", false),
        ] {
            let setup = NetworkSetup { nftables: text.to_owned(), ..NetworkSetup::default() };
            assert_eq!(orders(&setup).is_ok(), is_fine, "{text}");
        }
        // Forwarding sets others.
        let settings =
            [("ipv4/conf/all/send_redirects".to_owned(), "0".to_owned()), ("ipv4/ip_forward".into(), "1".into())];
        let [settings, ..] = orders(&NetworkSetup { settings: settings.into(), ..NetworkSetup::default() }).unwrap();
        assert_eq!(settings, "ipv4/ip_forward=1\nipv4/conf/all/send_redirects=0\n");
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
        assert!(!is_foreign(guests) && is_foreign("\t\txt match \"comment\" counter"));
    }

    #[test]
    fn a_route_of_which_something_isnt_known_isnt_carried() {
        let route =
            serde_json::json!({ "type": "unicast", "dst": "10.9.0.0/16", "gateway": "10.7.0.9", "flags": ["onlink"] });
        let words = route_words(&route).unwrap().unwrap();
        assert_eq!(words, ["unicast", "10.9.0.0/16", "via", "10.7.0.9", "onlink"]);
        let mut other = route.clone();
        other["nhid"] = 7.into();
        assert!(route_words(&other).unwrap_err().contains("nhid"));
    }
}
