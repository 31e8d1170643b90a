//! Images to and from a registry (Debian's docker-registry), with skopeo and umoci as the other side.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use layerfs_tests::case::Need::{Root, Tool};
use layerfs_tests::case::{Case, output_of};
use layerfs_tests::ctl::number;
use layerfs_tests::host::Host;
use layerfs_tests::servers::{Registry, silent_port};
use layerfs_tests::{compare, tree, zoo};
use serde_json::{Value, json};

/// The cases.
pub fn cases() -> Vec<Case> {
    vec![
        Case::new(
            "registry::skopeo_takes_what_is_pushed",
            &[Root, Tool("docker-registry"), Tool("skopeo"), Tool("rsync")],
            skopeo_takes_what_is_pushed,
        ),
        Case::new(
            "registry::images_come_with_their_configuration",
            &[Root, Tool("docker-registry"), Tool("skopeo"), Tool("umoci"), Tool("curl"), Tool("rsync")],
            images_come_with_their_configuration,
        ),
        Case::new("registry::packs_go_both_ways", &[Root, Tool("docker-registry"), Tool("rsync")], packs_go_both_ways),
        Case::new("registry::logins", &[Root, Tool("docker-registry")], logins),
        Case::new("registry::limits_hold_there_too", &[Root, Tool("docker-registry")], limits),
        Case::new("registry::failures_say_what_failed", &[Root, Tool("docker-registry")], failures),
    ]
}

fn skopeo(host: &Host, args: &[&str]) -> anyhow::Result<String> {
    let policy = host.path("policy.json");
    fs::write(&policy, "{\"default\": [{\"type\": \"insecureAcceptAnything\"}]}")?;
    output_of(Command::new("skopeo").arg("--policy").arg(&policy).args(args))
}

fn skopeo_takes_what_is_pushed() -> anyhow::Result<()> {
    let host = Host::new()?;
    let registry = Registry::start(&host.path("registry"), false)?;
    let source = host.path("source");
    tree::fill(&source, 71, 200, 4000)?;
    fs::hard_link(source.join("part-00/group-000/file-00000"), source.join("linked"))?;
    fs::write(source.join("large"), noise(3 << 20))?;
    zoo::set_time(&source, 1_700_000_000, 0)?;
    host.import(&source, "base", &[])?;
    fs::write(source.join("large-too"), noise(1 << 10))?;
    fs::remove_file(source.join("linked"))?;
    zoo::set_time(&source, 1_700_000_000, 0)?;
    host.import(&source, "app", &["--parent", "base", "--whole"])?;

    let place = format!("oci://{}/team/app", registry.host());
    let first = host.ctl.json(["push", "base", &format!("{place}:base"), "--plain-http"])?;
    ensure!(number(&first, "blobs_sent")? == 2 && number(&first, "bytes_sent")? > 3 << 20, "{first}");
    // What is there already isn't sent again: of the second stack only the small layer and the configuration.
    let second = host.ctl.json(["push", "app", &format!("{place}:1"), "--plain-http"])?;
    ensure!(number(&second, "blobs_sent")? == 2 && number(&second, "blobs_reused")? == 1, "{second}");
    ensure!(number(&second, "bytes_sent")? < 100_000, "{second}");
    let third = host.ctl.json(["push", "app", &format!("{place}:again"), "--plain-http"])?;
    ensure!(number(&third, "blobs_sent")? == 0 && third["digest"] == second["digest"], "{third}");
    // With other layers the tree is the same.
    host.ctl.ok(["push", "app", &format!("{place}:zstd"), "--plain-http", "--as", "image-zstd"])?;

    for tag in ["1", "zstd"] {
        let layout = host.path(format!("layout-{tag}"));
        let from = format!("docker://{}/team/app:{tag}", registry.host());
        skopeo(&host, &["copy", "--quiet", "--src-tls-verify=false", &from, &format!("oci:{}:x", layout.display())])?;
        host.import(&layout, &format!("back-{tag}"), &[])?;
        let out = host.path(format!("out-{tag}"));
        host.export(&format!("back-{tag}"), &out, &[])?;
        compare::same_by_rsync(&source, &out)?;
        let pulled = host.ctl.json(["pull", &format!("pulled-{tag}"), &format!("{place}:{tag}"), "--plain-http"])?;
        ensure!(pulled["id"] == host.ctl.json(["inspect", &format!("back-{tag}")])?["layer"]["id"], "{pulled}");
        ensure!(number(&pulled, "layers")? == 2, "{pulled}");
    }
    host.fsck()
}

fn packs_go_both_ways() -> anyhow::Result<()> {
    let (host, other) = (Host::new()?, Host::new()?);
    let registry = Registry::start(&host.path("registry"), false)?;
    let source = host.path("source");
    tree::fill(&source, 73, 200, 4000)?;
    tree::big_file(&source.join("big"), 73, 30_000_000)?;
    zoo::set_time(&source, 1_700_000_000, 0)?;
    host.import(&source, "base", &[])?;
    let added = host.new_folder("added")?;
    fs::write(added.join("added"), noise(100_000))?;
    host.import(&added, "app", &["--parent", "base"])?;
    // Another version: a little at the front of a large file, and everything else.
    let mut big = fs::read(source.join("big"))?;
    big.splice(1000..1000, noise(5000));
    fs::write(source.join("big"), &big)?;
    zoo::set_time(&source, 1_700_000_000, 0)?;
    host.import(&source, "base:2", &["--like", "base"])?;
    let place = format!("oci://{}/stacks", registry.host());
    let push = |name: &str, tag: &str| {
        host.ctl.json(["push", name, &format!("{place}:{tag}"), "--plain-http", "--as", "packs"])
    };
    let pull = |name: &str, tag: &str| other.ctl.json(["pull", name, &format!("{place}:{tag}"), "--plain-http"]);
    let first = push("base", "1")?;
    let (app, second) = (push("app", "app")?, push("base:2", "2")?);
    let bytes = |answer: &Value| number(answer, "bytes_sent");
    ensure!(bytes(&first)? > 30_000_000 && bytes(&app)? < 300_000, "{first} {app}");
    ensure!(bytes(&second)? < bytes(&first)? / 2, "{first} {second}");
    ensure!(number(&push("base", "1-again")?, "blobs_sent")? == 0);
    // There, each pull fetches what is lacking, and layers are the same layers.
    let all = number(&pull("base", "1")?, "bytes_received")?;
    let got = pull("app", "app")?;
    ensure!(number(&got, "bytes_received")? < all / 50, "{all} {got}");
    let got = pull("two", "2")?;
    ensure!(number(&got, "bytes_received")? < all / 2, "{all} {got}");
    let (here, there) = (host.names()?, other.names()?);
    ensure!(here["app"] == there["app"] && here["base:2"] == there["two"], "{here:?} {there:?}");
    other.export("two", &other.path("out"), &[])?;
    compare::same_by_rsync(&source, &other.path("out"))?;
    other.fsck()?;
    // Wrong bytes are never taken.
    let blobs =
        output_of(Command::new("find").arg(host.path("registry/data")).args(["-size", "+1M", "-name", "data"]))?;
    for blob in blobs.lines() {
        let mut bytes = fs::read(blob)?;
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(blob, &bytes)?;
    }
    let third = Host::new()?;
    third.ctl.run(["pull", "x", &format!("{place}:1"), "--plain-http"])?.failed_with(6)?;
    ensure!(third.names()?.is_empty(), "half a stack got a name");
    Ok(())
}

fn noise(bytes: usize) -> Vec<u8> {
    let mut out = vec![0; bytes];
    blake3::Hasher::new().update(&bytes.to_le_bytes()).finalize_xof().fill(&mut out);
    out
}

fn images_come_with_their_configuration() -> anyhow::Result<()> {
    let host = Host::new()?;
    let registry = Registry::start(&host.path("registry"), false)?;
    let source = host.path("source");
    tree::fill(&source, 72, 50, 2000)?;
    zoo::set_time(&source, 1_700_000_000, 0)?;
    host.import(&source, "plain", &[])?;
    let layout = host.path("layout");
    host.ctl.ok(["export", "plain", &format!("oci:{}:amd", layout.display())])?;
    let image = |tag: &str| format!("{}:{tag}", layout.display());
    let config = [
        "--config.env",
        "MODE=test",
        "--config.cmd",
        "/run",
        "--config.user",
        "7:8",
        "--config.workingdir",
        "/part-00",
        "--config.label",
        "a=b",
        "--config.exposedports",
        "80/tcp",
        "--config.entrypoint",
        "/bin/sh",
    ];
    output_of(Command::new("umoci").args(["config", "--image", &image("amd")]).args(config))?;
    output_of(Command::new("umoci").args([
        "config",
        "--image",
        &image("amd"),
        "--tag",
        "arm",
        "--architecture",
        "arm64",
    ]))?;
    for tag in ["amd", "arm"] {
        let to = format!("docker://{}/image:{tag}", registry.host());
        skopeo(&host, &["copy", "--quiet", "--dest-tls-verify=false", &format!("oci:{}", image(tag)), &to])?;
    }
    let place = format!("oci://{}/image", registry.host());
    host.ctl.ok(["pull", "amd", &format!("{place}:amd"), "--plain-http"])?;
    host.export("amd", &host.path("out"), &[])?;
    compare::same_by_rsync(&source, &host.path("out"))?;
    check_config(&host.ctl.json(["inspect", "amd"])?["image"]["configuration"])?;
    let text = host.ctl.ok(["inspect", "amd"])?.text();
    ensure!(text.contains("MODE=test") && text.contains("/part-00") && text.contains("7:8"), "{text}");
    // It goes out again, and with a layer on top.
    let more = host.new_folder("folder")?;
    fs::write(more.join("more"), "more")?;
    host.import(&more, "above", &["--parent", "amd"])?;
    host.ctl.ok(["push", "above", &format!("{place}:above"), "--plain-http"])?;
    let from = format!("docker://{}/image:above", registry.host());
    let shown: Value = serde_json::from_str(&skopeo(&host, &["inspect", "--config", "--tls-verify=false", &from])?)?;
    check_config(&shown)?;

    // An image for another platform is had only by asking.
    let refused = host.ctl.run(["pull", "arm", &format!("{place}:arm"), "--plain-http"])?.failed_with(3)?;
    ensure!(refused.contains("linux/arm64"), "{refused}");
    host.ctl.ok(["pull", "arm", &format!("{place}:arm"), "--plain-http", "--platform", "linux/arm64"])?;
    put_index(&registry, &["amd", "arm"])?;
    let digest = |answer: &Value| answer["digest"].as_str().unwrap_or_default().to_owned();
    let pull = |name: &str, options: &[&str]| {
        let mut line = vec!["pull".to_owned(), name.to_owned(), format!("{place}:both"), "--plain-http".to_owned()];
        line.extend(options.iter().map(|option| (*option).to_owned()));
        host.ctl.run(line)
    };
    let both: Value = serde_json::from_slice(&pull("both", &["--json"])?.ok()?.stdout)?;
    let other: Value = serde_json::from_slice(&pull("other", &["--json", "--platform", "linux/arm64"])?.ok()?.stdout)?;
    ensure!(digest(&both) != digest(&other), "both platforms have one image: {both} {other}");
    ensure!(host.ctl.json(["inspect", "other"])?["image"]["configuration"]["architecture"] == "arm64");
    let refused = pull("none", &["--platform", "linux/s390x"])?.failed_with(3)?;
    ensure!(refused.contains("linux/amd64, linux/arm64"), "{refused}");
    host.fsck()
}

fn check_config(config: &Value) -> anyhow::Result<()> {
    let inner = &config["config"];
    ensure!(
        config["architecture"] == "amd64" && inner["User"] == "7:8" && inner["WorkingDir"] == "/part-00",
        "{config}"
    );
    ensure!(inner["Labels"]["a"] == "b" && inner["ExposedPorts"] == json!({"80/tcp": {}}), "{config}");
    ensure!(inner["Entrypoint"] == json!(["/bin/sh"]) && inner["Cmd"] == json!(["/run"]), "{config}");
    let variables = inner["Env"].as_array().context("no environment")?;
    ensure!(variables.contains(&json!("MODE=test")), "{config}");
    Ok(())
}

/// Puts an index of the tags' manifests under the tag "both".
fn put_index(registry: &Registry, tags: &[&str]) -> anyhow::Result<()> {
    let place = format!("http://{}/v2/image/manifests", registry.host());
    let kind = "application/vnd.oci.image.manifest.v1+json";
    let mut manifests = Vec::new();
    for tag in tags {
        let head = output_of(Command::new("curl").args([
            "-sfI",
            "-H",
            &format!("Accept: {kind}"),
            &format!("{place}/{tag}"),
        ]))?;
        let field = |name: &str| {
            let line = head.lines().find_map(|line| line.to_ascii_lowercase().strip_prefix(name).map(str::to_owned));
            line.map(|value| value.trim().to_owned()).with_context(|| format!("no {name} in {head}"))
        };
        let architecture = if *tag == "arm" { "arm64" } else { "amd64" };
        manifests.push(json!({
            "mediaType": kind,
            "digest": field("docker-content-digest:")?,
            "size": field("content-length:")?.parse::<u64>()?,
            "platform": { "os": "linux", "architecture": architecture },
        }));
    }
    let index_type = "application/vnd.oci.image.index.v1+json";
    let index = json!({ "schemaVersion": 2, "mediaType": index_type, "manifests": manifests });
    let header = format!("Content-Type: {index_type}");
    output_of(Command::new("curl").args([
        "-sf",
        "-X",
        "PUT",
        "-H",
        &header,
        "-d",
        &index.to_string(),
        &format!("{place}/both"),
    ]))?;
    Ok(())
}

/// A command with something on its stdin; its exit code and what it said.
fn with_input(command: &mut Command, input: &str) -> anyhow::Result<(i32, String)> {
    use std::io::Write;
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    child.stdin.take().context("no stdin")?.write_all(input.as_bytes())?;
    let output = child.wait_with_output()?;
    Ok((output.status.code().unwrap_or(-1), String::from_utf8_lossy(&output.stderr).into_owned()))
}

fn small(host: &Host) -> anyhow::Result<()> {
    let source = host.new_folder("source")?;
    fs::write(source.join("file"), noise(200_000))?;
    host.import(&source, "small", &[])?;
    Ok(())
}

fn logins() -> anyhow::Result<()> {
    let host = Host::new()?;
    let registry = Registry::start(&host.path("registry"), true)?;
    small(&host)?;
    let place = format!("oci://{}/small:1", registry.host());
    let push = ["push", "small", &place, "--plain-http"];
    let quiet = |command: &mut Command| {
        // Nobody's own logins.
        command.env("HOME", host.path("nobody")).env_remove("REGISTRY_AUTH_FILE").env_remove("XDG_RUNTIME_DIR");
    };
    let run = |more: &[&str], variables: &[(&str, &Path)], input: &str| {
        let mut command = host.ctl.command(push.iter().chain(more));
        quiet(&mut command);
        command.envs(variables.iter().copied());
        with_input(&mut command, input)
    };
    let (code, said) = run(&[], &[], "")?;
    ensure!(code == 9 && said.contains("docker login"), "{code}: {said}");
    let login = ["--username", "tester", "--password-stdin"];
    let (code, said) = run(&login, &[], "wrong")?;
    ensure!(code == 9, "{code}: {said}");
    let (code, said) = run(&login, &[], "secret\n")?;
    ensure!(code == 0, "{code}: {said}");
    // tester:secret in base64.
    let file = host.path("auth.json");
    fs::write(&file, format!(r#"{{"auths":{{"{}":{{"auth":"dGVzdGVyOnNlY3JldA=="}}}}}}"#, registry.host()))?;
    let (code, said) = run(&[], &[("REGISTRY_AUTH_FILE", &file)], "")?;
    ensure!(code == 0, "{code}: {said}");
    let log = fs::read_to_string(host.ctl.store().join("daemon.log")).unwrap_or_default();
    ensure!(!log.contains("secret"), "the password is in the log");
    Ok(())
}

/// The running transfer with a registry, as soon as it has moved so many bytes.
fn running(host: &Host, key: &str, bytes: u64) -> anyhow::Result<Value> {
    for _ in 0..6000 {
        let list = host.ctl.json(["transfers"])?;
        let all = list["transfers"].as_array().context("no list")?;
        let found = all.iter().find(|one| one["state"] == "running" && one[key].as_u64() >= Some(bytes));
        if let Some(found) = found {
            ensure!(found["peer"].as_str().is_some_and(|peer| peer.starts_with("oci://")), "{found}");
            return Ok(found.clone());
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    anyhow::bail!("no transfer runs: {}", host.ctl.json(["transfers"])?)
}

/// It has been no faster than 1 MiB/s, but for two pieces (up to 400 KB each): one under way, one in debt.
fn is_limited(transfer: &Value, key: &str) -> anyhow::Result<()> {
    let seconds = transfer["seconds"].as_f64().context("no time")?;
    ensure!(number(transfer, key)? as f64 <= seconds * 1_048_576.0 * 1.1 + 1_000_000.0, "over its limit: {transfer}");
    Ok(())
}

fn limits() -> anyhow::Result<()> {
    let host = Host::new()?;
    let registry = Registry::start(&host.path("registry"), false)?;
    let source = host.new_folder("source")?;
    fs::write(source.join("noise"), noise(20_000_000))?;
    host.import(&source, "noise", &[])?;
    let place = format!("oci://{}/noise:1", registry.host());
    let push = ["push", "noise", &place, "--plain-http", "--limit", "1M"];
    let pull = ["pull", "again", &place, "--plain-http"];
    std::thread::scope(|scope| {
        let pushed = scope.spawn(|| host.ctl.ok(push));
        let transfer = running(&host, "bytes_sent", 3_000_000)?;
        is_limited(&transfer, "bytes_sent")?;
        ensure!(number(&transfer, "limit")? == 1 << 20, "{transfer}");
        host.ctl.ok(["transfers", "limit", "none", &transfer["id"].to_string()])?;
        pushed.join().map_err(|_| anyhow::anyhow!("the push panicked"))??;
        // The daemon's own limit, and an end at a word.
        host.ctl.ok(["limit", "1M"])?;
        let pulled = scope.spawn(|| host.ctl.run(pull));
        let transfer = running(&host, "bytes_received", 3_000_000)?;
        is_limited(&transfer, "bytes_received")?;
        host.ctl.ok(["transfers", "cancel", &transfer["id"].to_string()])?;
        let pulled = pulled.join().map_err(|_| anyhow::anyhow!("the pull panicked"))??;
        ensure!(pulled.code != 0 && host.ctl.run(["inspect", "again"])?.code == 3, "it was pulled all the same");
        Ok(())
    })
}

fn failures() -> anyhow::Result<()> {
    let host = Host::new()?;
    let registry = Registry::start(&host.path("registry"), false)?;
    small(&host)?;
    let place = format!("oci://{}/small", registry.host());
    let code = |line: &[&str], code| host.ctl.run(line)?.failed_with(code);
    code(&["pull", "x", &format!("{place}:none"), "--plain-http"], 3)?;
    code(&["push", "none", &place, "--plain-http"], 3)?;
    code(&["push", "small", "oci://nonsense", "--plain-http"], 2)?;
    code(&["push", "small", "central", "--plain-http"], 2)?;
    let said = code(&["import", &place, "x"], 2)?;
    ensure!(said.contains("layerctl pull x"), "{said}");
    host.ctl.ok(["push", "small", &format!("{place}:1"), "--plain-http"])?;
    code(&["pull", "small", &format!("{place}:1"), "--plain-http"], 4)?;
    let (_taken, silent) = silent_port()?;
    let nobody = format!("oci://127.0.0.1:{silent}/small:1");
    code(&["pull", "x", &nobody, "--plain-http"], 10)?;
    // A blob that isn't what it should be: the layer's, the largest.
    let blobs =
        output_of(Command::new("find").arg(host.path("registry/data")).args(["-size", "+100k", "-name", "data"]))?;
    let blob = blobs.lines().next().context("no blob in the registry")?;
    let mut bytes = fs::read(blob)?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(blob, &bytes)?;
    let said = code(&["pull", "x", &format!("{place}:1"), "--plain-http"], 6)?;
    ensure!(said.contains("digest"), "{said}");
    bytes.truncate(middle);
    fs::write(blob, &bytes)?;
    host.ctl.run(["pull", "x", &format!("{place}:1"), "--plain-http"])?;
    ensure!(host.ctl.run(["inspect", "x"])?.code == 3, "half an image got a name");
    let left = fs::read_dir(host.ctl.store().join("tmp"))?.count();
    ensure!(left == 0, "{left} temporary files stay");
    Ok(())
}
