//! Secret files that are replaced while the process runs.

use std::path::PathBuf;

use parking_lot::Mutex;
use secrecy::{ExposeSecret, SecretString};

use super::load::read_secret;

/// Watch on a secret file, such as one of a mounted Kubernetes secret.
#[derive(Debug)]
pub struct RotatedSecret {
    key: &'static str,
    file: Option<PathBuf>,
    known: Mutex<Known>,
}

#[derive(Debug)]
struct Known {
    secret: SecretString,
    /// Problem that was reported last, so that each is logged once.
    problem: Option<String>,
}

impl RotatedSecret {
    /// Watches the file of `key`, whose content was `secret` at the start. Without a file nothing ever changes.
    #[must_use]
    pub fn new(key: &'static str, file: Option<PathBuf>, secret: SecretString) -> Self {
        Self { key, file, known: Mutex::new(Known { secret, problem: None }) }
    }

    /// Content of the file if it differs from the one known before. An unreadable file changes nothing: the known secret
    /// may still be valid.
    pub fn changed(&self) -> Option<SecretString> {
        self.file.as_ref()?;
        let mut known = self.known.lock();
        let mut secret = SecretString::default();
        let problem = read_secret(self.key, self.file.as_deref(), &mut secret).err().map(|error| error.to_string());
        if problem.is_some() {
            if known.problem != problem {
                tracing::warn!(problem, "secret file unreadable; keeping the previous content");
                known.problem = problem;
            }
            return None;
        }
        known.problem = None;
        if secret.expose_secret() == known.secret.expose_secret() {
            return None;
        }
        known.secret = secret.clone();
        tracing::info!(key = self.key, "secret file changed");
        Some(secret)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_file_is_reported_once_and_an_unreadable_one_changes_nothing() {
        let path = std::env::temp_dir().join(format!("inventoryd-rotated-{}", std::process::id()));
        let watch = RotatedSecret::new("broker.url_file", Some(path.clone()), "first".into());
        assert!(watch.changed().is_none(), "there is no file yet");
        std::fs::write(&path, "first\n").unwrap();
        assert!(watch.changed().is_none(), "the same content");
        std::fs::write(&path, "second\n").unwrap();
        assert_eq!(watch.changed().map(|secret| secret.expose_secret().to_owned()).as_deref(), Some("second"));
        std::fs::write(&path, "\n").unwrap();
        assert!(watch.changed().is_none(), "an empty file is no secret");
        std::fs::remove_file(&path).unwrap();
        assert!(watch.changed().is_none());
        assert!(RotatedSecret::new("database.url_file", None, "fixed".into()).changed().is_none());
    }
}
