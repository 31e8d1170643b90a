//! The keys for an object store, from where Amazon's tools have them: the environment, or the credentials file.

use std::path::{Path, PathBuf};

use migrator::tier::Keys;

use crate::config::Environment;
use crate::failure::{Failure, Result};

/// The keys in force; none if there are none. `file` and `profile` are what the config file says.
///
/// # Errors
/// A file that was named and can't be read, or a profile that isn't in it.
pub fn keys(environment: &Environment, file: Option<&Path>, profile: Option<&str>) -> Result<Option<Keys>> {
    if file.is_none()
        && let (Some(access), Some(secret)) =
            (environment.text("AWS_ACCESS_KEY_ID"), environment.text("AWS_SECRET_ACCESS_KEY"))
    {
        return Ok(Some(Keys { access, secret, token: environment.text("AWS_SESSION_TOKEN") }));
    }
    let usual = || environment.path("HOME").map(|home| home.join(".aws/credentials"));
    let named = file.map(PathBuf::from).or_else(|| environment.path("AWS_SHARED_CREDENTIALS_FILE"));
    let Some(path) = named.clone().or_else(usual) else { return Ok(None) };
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound && named.is_none() => return Ok(None),
        Err(e) => return Err(Failure::file("read", &path, e)),
    };
    let profile = profile.map(str::to_owned).or_else(|| environment.text("AWS_PROFILE"));
    let found = parse(&text, profile.as_deref().unwrap_or("default"));
    if found.is_none() && (named.is_some() || profile.is_some()) {
        let profile = profile.unwrap_or_else(|| "default".to_owned());
        return Err(Failure::invalid(format!("{} has no keys for profile {profile:?}", path.display())));
    }
    Ok(found)
}

/// The keys of `profile` in a credentials file.
fn parse(text: &str, profile: &str) -> Option<Keys> {
    let (mut access, mut secret, mut token) = (None, None, None);
    let mut is_ours = false;
    for line in text.lines().map(str::trim) {
        if let Some(section) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            is_ours = section.trim() == profile;
        } else if let (true, Some((key, value))) = (is_ours, line.split_once('=')) {
            let value = Some(value.trim().to_owned());
            match key.trim() {
                "aws_access_key_id" => access = value,
                "aws_secret_access_key" => secret = value,
                "aws_session_token" => token = value,
                _ => {}
            }
        }
    }
    Some(Keys { access: access?, secret: secret?, token })
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    #[test]
    fn keys_come_from_the_environment_or_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("credentials");
        let text = "[default]\naws_access_key_id = A\naws_secret_access_key=S=\n# no\n[other]\naws_access_key_id = B\naws_secret_access_key = T\naws_session_token = U\n";
        std::fs::write(&path, text).unwrap();
        let mut environment = Environment::default();
        let found = |environment: &Environment, file: Option<&Path>, profile: Option<&str>| {
            keys(environment, file, profile).unwrap().map(|keys| (keys.access, keys.secret, keys.token))
        };
        assert_eq!(found(&environment, None, None), None);
        assert_eq!(found(&environment, Some(&path), None), Some(("A".into(), "S=".into(), None)));
        let other = Some(("B".to_owned(), "T".to_owned(), Some("U".to_owned())));
        assert_eq!(found(&environment, Some(&path), Some("other")), other);
        assert!(keys(&environment, Some(&path), Some("none")).is_err());
        environment.variables = HashMap::from([("AWS_SHARED_CREDENTIALS_FILE".into(), path.clone().into())]);
        environment.variables.insert("AWS_PROFILE".into(), "other".into());
        assert_eq!(found(&environment, None, None), other);
        environment.variables.insert("AWS_ACCESS_KEY_ID".into(), "E".into());
        environment.variables.insert("AWS_SECRET_ACCESS_KEY".into(), "V".into());
        assert_eq!(found(&environment, None, None), Some(("E".into(), "V".into(), None)));
    }
}
