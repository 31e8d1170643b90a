//! Who the user is at a registry, as `docker login` and `podman login` left it.
//!
//! Read by the command, not by the daemon: the files and helpers are the user's. They pass through the control socket,
//! never through a command line or a log. Order: `$REGISTRY_AUTH_FILE`, podman's files, docker's file; of one file the
//! most specific entry.

use std::collections::HashMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use base64::Engine as _;
use serde::Deserialize;

use crate::api::registry::Login;
use crate::config::Environment;
use crate::failure::{Class, Failure, Result};

/// What docker.io is called in those files.
const DOCKER_KEYS: [&str; 3] = ["docker.io", "index.docker.io", "https://index.docker.io/v1/"];
/// No such file is longer, in bytes.
const MAX_FILE: u64 = 1 << 20;

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct AuthFile {
    auths: HashMap<String, Auth>,
    creds_store: Option<String>,
    cred_helpers: HashMap<String, String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Auth {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
}

/// The user's login for `registry`, if there is one.
///
/// # Errors
/// A file that was named and isn't there, or one that makes no sense.
pub fn find(registry: &str, repository: &str, environment: &Environment) -> Result<Option<Login>> {
    if let Some(only) = environment.path("REGISTRY_AUTH_FILE") {
        let file = read(&only)?.ok_or_else(|| {
            let text = format!("the file {} that REGISTRY_AUTH_FILE names does not exist", only.display());
            Failure::new(Class::NotFound, text)
        })?;
        return file.login(registry, repository, environment);
    }
    for path in files(environment) {
        if let Some(file) = read(&path)?
            && let Some(login) = file.login(registry, repository, environment)?
        {
            return Ok(Some(login));
        }
    }
    Ok(None)
}

fn files(environment: &Environment) -> Vec<PathBuf> {
    let runtime = environment.path("XDG_RUNTIME_DIR").map(|folder| folder.join("containers/auth.json"));
    let user = environment.xdg("XDG_CONFIG_HOME", ".config").map(|folder| folder.join("containers/auth.json"));
    let docker =
        environment.path("DOCKER_CONFIG").or_else(|| environment.path("HOME").map(|home| home.join(".docker")));
    let docker = docker.map(|folder| folder.join("config.json"));
    [runtime, user, docker].into_iter().flatten().collect()
}

fn read(path: &Path) -> Result<Option<AuthFile>> {
    use std::io::Read;
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Failure::file("read", path, e)),
    };
    let mut text = Vec::new();
    file.take(MAX_FILE).read_to_end(&mut text).map_err(|e| Failure::file("read", path, e))?;
    if text.trim_ascii().is_empty() {
        return Ok(None);
    }
    // The error's text could hold a piece of a password.
    serde_json::from_slice(&text)
        .map(Some)
        .map_err(|error| Failure::invalid(format!("{} is no file of logins (line {})", path.display(), error.line())))
}

impl AuthFile {
    fn login(&self, registry: &str, repository: &str, environment: &Environment) -> Result<Option<Login>> {
        let keys = keys(registry, repository);
        for key in &keys {
            if let Some(helper) = self.cred_helpers.get(key) {
                return ask_helper(helper, key, environment);
            }
            if let Some(auth) = self.auths.get(key)
                && let Some(login) = auth.login(key)?
            {
                return Ok(Some(login));
            }
        }
        let Some(store) = &self.creds_store else { return Ok(None) };
        for key in keys.iter().filter(|key| self.auths.contains_key(*key)) {
            if let Some(login) = ask_helper(store, key, environment)? {
                return Ok(Some(login));
            }
        }
        Ok(None)
    }
}

impl Auth {
    fn login(&self, key: &str) -> Result<Option<Login>> {
        if let (Some(username), Some(password)) = (&self.username, &self.password) {
            return Ok(Some(Login { username: username.clone(), password: password.clone() }));
        }
        let Some(auth) = self.auth.as_deref().filter(|auth| !auth.is_empty()) else { return Ok(None) };
        let wrong = || Failure::invalid(format!("the login for {key} is not what `docker login` writes; log in again"));
        let plain = base64::engine::general_purpose::STANDARD.decode(auth).map_err(|_| wrong())?;
        let plain = String::from_utf8(plain).map_err(|_| wrong())?;
        let (username, password) = plain.split_once(':').ok_or_else(wrong)?;
        Ok(Some(Login { username: username.to_owned(), password: password.trim_end_matches('\0').to_owned() }))
    }
}

/// What an entry for the repository can be called, the most specific first.
fn keys(registry: &str, repository: &str) -> Vec<String> {
    let mut keys = vec![format!("{registry}/{repository}")];
    let mut rest = repository;
    while let Some((parent, _)) = rest.rsplit_once('/') {
        keys.push(format!("{registry}/{parent}"));
        rest = parent;
    }
    keys.push(registry.to_owned());
    for prefix in ["https://", "http://"] {
        keys.extend(["", "/", "/v1/", "/v2/"].map(|end| format!("{prefix}{registry}{end}")));
    }
    if DOCKER_KEYS.contains(&registry) {
        keys.extend(DOCKER_KEYS.map(str::to_owned));
    }
    keys
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct HelperAnswer {
    username: String,
    secret: String,
}

/// Asks `docker-credential-<name>`, which gets the registry on stdin.
fn ask_helper(name: &str, key: &str, environment: &Environment) -> Result<Option<Login>> {
    let program = format!("docker-credential-{name}");
    if name.is_empty() || name.contains('/') {
        return Err(Failure::invalid(format!("{name:?} is no credential helper")));
    }
    let failed = |e| Failure::file("run", Path::new(&program), e);
    let mut command = Command::new(&program);
    command.arg("get").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    command.env_clear().envs(&environment.variables);
    let mut child = command.spawn().map_err(failed)?;
    if let Some(mut stdin) = child.stdin.take() {
        // One that doesn't read answers all the same.
        let _ = stdin.write_all(key.as_bytes());
    }
    let output = child.wait_with_output().map_err(failed)?;
    if !output.status.success() {
        return Ok(None);
    }
    let answer: HelperAnswer = serde_json::from_slice(&output.stdout)
        .map_err(|_| Failure::invalid(format!("{program} answers something else than a login")))?;
    if answer.username == "<token>" {
        let text = format!("{program} has an identity token for {key}, which is not supported");
        return Err(Failure::new(Class::Unsupported, text).hint("use --username and --password-stdin"));
    }
    Ok(Some(Login { username: answer.username, password: answer.secret }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(folder: &Path) -> Environment {
        Environment {
            variables: HashMap::from([("HOME".into(), folder.as_os_str().to_owned())]),
            ..Environment::default()
        }
    }

    fn auth(text: &str) -> String {
        base64::engine::general_purpose::STANDARD.encode(text)
    }

    #[test]
    fn logins_are_found_where_docker_and_podman_leave_them() {
        let folder = tempfile::tempdir().unwrap();
        let mut environment = environment(folder.path());
        let found = |registry: &str, repository: &str, environment: &Environment| {
            find(registry, repository, environment).unwrap().map(|login| (login.username, login.password))
        };
        assert_eq!(found("r.example", "a/b", &environment), None);
        std::fs::create_dir_all(folder.path().join(".docker")).unwrap();
        let docker = format!(
            r#"{{"auths":{{"r.example":{{"auth":"{}"}},"https://index.docker.io/v1/":{{"auth":"{}"}}}},"other":1}}"#,
            auth("u:p:q"),
            auth("hub:h")
        );
        std::fs::write(folder.path().join(".docker/config.json"), docker).unwrap();
        assert_eq!(found("r.example", "a/b", &environment), Some(("u".into(), "p:q".into())));
        assert_eq!(found("docker.io", "library/x", &environment), Some(("hub".into(), "h".into())));
        assert_eq!(found("r.example:5000", "a", &environment), None);
        std::fs::create_dir_all(folder.path().join(".config/containers")).unwrap();
        let podman = format!(r#"{{"auths":{{"r.example/a":{{"auth":"{}"}}}}}}"#, auth("team:t"));
        std::fs::write(folder.path().join(".config/containers/auth.json"), podman).unwrap();
        assert_eq!(found("r.example", "a/b", &environment), Some(("team".into(), "t".into())));
        assert_eq!(found("r.example", "c", &environment), Some(("u".into(), "p:q".into())));
        environment.variables.insert("REGISTRY_AUTH_FILE".into(), folder.path().join("none").into());
        assert_eq!(find("r.example", "a", &environment).unwrap_err().class, Class::NotFound);
        std::fs::write(folder.path().join("none"), "{\"auths\": secret").unwrap();
        assert!(!find("r.example", "a", &environment).unwrap_err().message.contains("secret"));
    }

    #[test]
    fn a_helper_is_asked_without_a_secret_on_its_command_line() {
        let folder = tempfile::tempdir().unwrap();
        let mut environment = environment(folder.path());
        let helper = folder.path().join("docker-credential-test");
        let script = "#!/bin/sh\nread key\necho \"{\\\"Username\\\":\\\"$1\\\",\\\"Secret\\\":\\\"$key\\\"}\"\n";
        // Not by this process: a child of another test would hold a copy of the descriptor for a moment, and a file that somebody writes
        // to can't be run.
        let mut write = Command::new("sh");
        write.args(["-euc", "printf %s \"$0\" >\"$1\"; chmod 755 \"$1\"", script]).arg(&helper);
        assert!(write.status().unwrap().success());
        let path = format!("{}:/usr/bin:/bin", folder.path().display());
        environment.variables.insert("PATH".into(), path.into());
        let file =
            AuthFile { cred_helpers: HashMap::from([("r.example".into(), "test".into())]), ..AuthFile::default() };
        let login = file.login("r.example", "a", &environment).unwrap().unwrap();
        assert_eq!((login.username.as_str(), login.password.as_str()), ("get", "r.example"));
    }
}
