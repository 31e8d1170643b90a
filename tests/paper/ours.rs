//! A cell by `layerctl migrate`, between two daemons.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use layerfs_tests::host::{Host, TwoHosts};
use layerfs_tests::network::Link;
use serde_json::Value;

use crate::cell::{App, Case, Cell, Kind, Method};
use crate::clients::Clients;
use crate::lan::{GUEST, Lan, MASK, PORT};
use crate::measure::Bound;
use crate::record::{Record, Stage};
use crate::{measure, roots};

const NAME: &str = "guest";

/// Both hosts; the guest is removed at the end, wherever it is.
struct Hosts(TwoHosts);

impl Drop for Hosts {
    fn drop(&mut self) {
        for host in [&self.0.a, &self.0.b] {
            let _ = host.ctl.run(["guest", "remove", NAME, "--force"]);
        }
    }
}

/// Measures `cell`, in which the migration takes `most` at most.
pub fn run(cell: Cell, most: Option<Duration>) -> anyhow::Result<Record> {
    let hosts = Hosts(TwoHosts::on(Link::new()?)?);
    let (a, b, link) = (&hosts.0.a, &hosts.0.b, &hosts.0.link);
    a.ctl.ok(["peer", "set", "b", "--allow-guests"])?;
    b.ctl.ok(["peer", "set", "a", "--allow-guests"])?;
    let lan = Lan::new(link)?;
    import(a, cell)?;
    hosts.0.push(&["base"])?;
    if cell.case == Case::Found {
        hosts.0.push(&["app"])?;
    }
    a.ctl.ok(create(cell))?;
    a.ctl.ok(["guest", "start", NAME])?;
    let clients = Clients::start(&lan.user, cell.app)?;
    measure::warm_up(cell, &clients);
    link.shape(cell.megabits)?;
    let (noise, busy) = measure::quiet(&clients)?;

    let (before, began) = (measure::wire_bytes(link)?, Instant::now());
    // Not by the harness, which gives no command longer than a few minutes.
    let output = Bound::after(most).output(&mut a.ctl.command(migrate(cell)))?;
    let total = began.elapsed();
    ensure!(
        output.status.success(),
        "layerctl migrate: {}\nsource: {}\ndestination: {}",
        String::from_utf8_lossy(&output.stderr),
        logged(a),
        logged(b)
    );
    let report: Value = serde_json::from_slice(&output.stdout).context("layerctl migrate gives no report")?;
    ensure!(report["outcome"] == "moved", "{report}");
    if let App::Ram(megabytes) = cell.app {
        let memory = report["memory_bytes"].as_u64().unwrap_or_default();
        ensure!(memory >= u64::from(megabytes) << 20, "it was moved with {memory} bytes, before its memory was filled");
    }
    clients.settle(began)?;
    let mut record = Record {
        cell: cell.to_string(),
        total_seconds: total.as_secs_f64(),
        wire_bytes: measure::wire_bytes(link)? - before,
        downtime_seconds: clients.longest_gap(began).as_secs_f64(),
        first_program_seconds: clients.longest_gap_of_first(began).as_secs_f64(),
        noise_seconds: noise.as_secs_f64(),
        busy,
        dump_seconds: 0.0,
        restore_seconds: report["restore_seconds"].as_f64().unwrap_or_default(),
        stopped_bytes: report["downtime"]["bytes"].as_u64(),
        memory_bytes: report["memory_bytes"].as_u64(),
        stages: Vec::new(),
        notes: clients.notes(),
        machine: measure::machine()?,
        day: measure::day()?,
        build: measure::build()?,
    };
    read_stages(&report, &mut record);
    Ok(record)
}

/// The order to move it.
fn migrate(cell: Cell) -> Vec<&'static str> {
    let layers = if cell.case == Case::Two { "2" } else { "3" };
    let mut words = vec!["migrate", NAME, "b", "--layers", layers, "--json"];
    if matches!(cell.app, App::Ram(_)) && cell.method == Method::Ours {
        // What is rewritten all the time and can't be compressed goes over once only if it goes after the guest.
        words.extend(["--postcopy", "--rounds", "0"]);
    }
    words
}

fn logged(host: &Host) -> String {
    let text = host.daemon.as_ref().map(|daemon| daemon.log_text()).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(8)..].join("\n")
}

fn read_stages(report: &Value, record: &mut Record) {
    for stage in report["stages"].as_array().into_iter().flatten() {
        let name = stage["name"].as_str().unwrap_or_default().to_owned();
        let seconds = stage["seconds"].as_f64().unwrap_or_default();
        if name == "dump" {
            record.dump_seconds = seconds;
        }
        record.stages.push(Stage { name, seconds, is_down: stage["is_down"] == true });
    }
    let said = |key: &str| report[key]["seconds"].as_f64().unwrap_or_default();
    record.notes.push(format!(
        "the host's own count of the downtime: {:.3} s, predicted {:.3} s",
        said("downtime"),
        said("predicted")
    ));
    for (number, round) in report["rounds"].as_array().into_iter().flatten().enumerate() {
        let said = |key: &str| round[key].as_f64().unwrap_or_default();
        record.notes.push(format!(
            "round {}: {:.1} MB sent in {:.2} s, the memory read in {:.2} s",
            number + 1,
            said("bytes") / 1e6,
            said("send_seconds"),
            said("read_seconds")
        ));
    }
    let decisions = report["decisions"].as_array().into_iter().flatten().filter_map(Value::as_str);
    record.notes.extend(decisions.map(str::to_owned));
}

/// Base and application as layers of the first host.
fn import(host: &Host, cell: Cell) -> anyhow::Result<()> {
    match cell.kind {
        Kind::Process | Kind::Lxc => {
            host.import(&roots::tree(App::None)?, "base", &["--kind", "base"])?;
            host.import(&roots::tree(cell.app)?, "app", &["--parent", "base", "--whole"])?;
        }
        Kind::Kvm => {
            // The kernel lies over the disk, and belongs to what every host has.
            host.import(&roots::disk(App::None)?, "disk", &["--kind", "base"])?;
            roots::boot_files(&host.path("boot"))?;
            host.import(&host.path("boot"), "base", &["--parent", "disk", "--kind", "base"])?;
            host.import(&roots::disk(cell.app)?, "app", &["--parent", "base"])?;
        }
    }
    Ok(())
}

fn create(cell: Cell) -> Vec<String> {
    let network = format!("bridge:br0,{GUEST}/24");
    let driver = match cell.kind {
        Kind::Process => "process",
        Kind::Lxc => "lxc",
        Kind::Kvm => "qemu",
    };
    let fixed = ["guest", "create", NAME, "--driver", driver, "--on", "app", "--network", &network];
    let mut words: Vec<String> = fixed.map(str::to_owned).to_vec();
    match cell.kind {
        Kind::Process | Kind::Lxc => {
            words.extend(["--", roots::SERVICE, PORT].map(str::to_owned));
            words.extend(roots::command(cell.app));
        }
        Kind::Kvm => {
            let memory = format!("{}M", measure::machine_megabytes(cell.app));
            let append = machine_append(cell.app);
            let machine = ["--memory", &memory, "--kernel", "/vmlinuz", "--initrd", "/initrd", "--append", &append];
            words.extend(machine.map(str::to_owned));
        }
    }
    words
}

/// The kernel's command line of a machine with `app`; what follows the dashes is its first program's.
pub fn machine_append(app: App) -> String {
    let command = roots::command(app).join(" ");
    format!("console=ttyS0 quiet -- --machine {GUEST} {MASK} {PORT} {command}").trim_end().to_owned()
}
