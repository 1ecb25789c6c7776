//! Credentials for the token service.

use std::collections::BTreeMap;
use std::path::PathBuf;

use schemars::JsonSchema;
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;

use super::load::read_secret;
use super::{ConfigError, path_or_none};

/// `[graph.credentials.<name>]`
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[expect(missing_docs, reason = "config/default.toml documents every key")]
pub struct CredentialConfig {
    pub kind: CredentialKind,
    pub client_id: String,
    #[schemars(with = "String")]
    pub client_secret: SecretString,
    #[serde(deserialize_with = "path_or_none")]
    pub client_secret_file: Option<PathBuf>,
    #[serde(deserialize_with = "path_or_none")]
    pub client_certificate_file: Option<PathBuf>,
    #[schemars(with = "String")]
    pub client_certificate_password: SecretString,
    #[serde(deserialize_with = "path_or_none")]
    pub client_certificate_password_file: Option<PathBuf>,
    #[serde(deserialize_with = "path_or_none")]
    pub client_key_file: Option<PathBuf>,
    #[serde(deserialize_with = "path_or_none")]
    pub token_file: Option<PathBuf>,
}

/// Kind of a credential.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum CredentialKind {
    /// Client secret of the application.
    #[default]
    ClientSecret,
    /// Client certificate, whose key signs an assertion.
    ClientCertificate,
    /// Federated token of a trusted issuer, such as Kubernetes.
    WorkloadIdentity,
    /// Managed identity of the Azure host.
    ManagedIdentity,
}

/// Credential of a name; without regard to case, because variables are: no two names differ by case alone.
#[must_use]
pub fn credential_by_name<'a>(
    credentials: &'a BTreeMap<String, CredentialConfig>,
    name: &str,
) -> Option<&'a CredentialConfig> {
    let mut named = credentials.iter().filter(|(known, _)| known.to_lowercase() == name.to_lowercase());
    named.next().map(|(_, credential)| credential)
}

impl CredentialConfig {
    /// Reads the current client secret. The file is read on each call, so that secrets can be rotated.
    ///
    /// # Errors
    /// If the file can't be read or is empty.
    pub fn read_client_secret(&self) -> Result<SecretString, ConfigError> {
        let mut secret = self.client_secret.clone();
        read_secret("client_secret_file", self.client_secret_file.as_deref(), &mut secret)?;
        Ok(secret)
    }

    /// Reads the current password of a PKCS#12 file; empty if there is none.
    ///
    /// # Errors
    /// If the file can't be read or is empty.
    pub fn read_certificate_password(&self) -> Result<SecretString, ConfigError> {
        let mut password = self.client_certificate_password.clone();
        read_secret(
            "client_certificate_password_file",
            self.client_certificate_password_file.as_deref(),
            &mut password,
        )?;
        Ok(password)
    }

    /// File with the federated token of a workload identity: the configured one, or the one that Kubernetes names.
    #[must_use]
    pub fn federated_token_file(&self) -> Option<PathBuf> {
        self.token_file.clone().or_else(|| std::env::var_os("AZURE_FEDERATED_TOKEN_FILE").map(PathBuf::from))
    }

    /// Client id of a workload identity: the configured one, or the one that Kubernetes gives.
    #[must_use]
    pub fn federated_client_id(&self) -> Option<String> {
        let configured = Some(self.client_id.clone()).filter(|id| !id.is_empty());
        let given = || std::env::var_os("AZURE_CLIENT_ID").and_then(|id| id.into_string().ok());
        configured.or_else(given).filter(|id| !id.is_empty())
    }

    /// Returns `true` for a client secret of which nothing is set, as by default.
    #[must_use]
    pub fn is_unset(&self) -> bool {
        self.kind == CredentialKind::ClientSecret
            && self.client_id.is_empty()
            && self.client_secret.expose_secret().is_empty()
            && self.client_secret_file.is_none()
    }

    /// Invalid or missing values; each starts with the name of its key.
    pub(super) fn problems(&self) -> Vec<&'static str> {
        let is_certificate = self.kind == CredentialKind::ClientCertificate;
        let has_certificate = self.client_certificate_file.is_some();
        let mut problems = Vec::new();
        if is_certificate && !has_certificate {
            problems.push(
                "client_certificate_file: must name a PEM or PKCS#12 file, because kind is \"client_certificate\"",
            );
        }
        if is_certificate && self.client_id.is_empty() {
            problems.push("client_id: must be the application's id, because kind is \"client_certificate\"");
        }
        if has_certificate && !is_certificate {
            problems.push("kind: must be \"client_certificate\" for client_certificate_file to be used");
        }
        let has_password = self.client_certificate_password_file.is_some()
            || !self.client_certificate_password.expose_secret().is_empty();
        if has_password && !has_certificate {
            problems.push("client_certificate_file: must name the PKCS#12 file of client_certificate_password");
        }
        if self.token_file.is_some() && self.kind != CredentialKind::WorkloadIdentity {
            problems.push("kind: must be \"workload_identity\" for token_file to be used");
        }
        if self.client_id.chars().any(|c| c.is_whitespace() || c.is_control()) {
            problems.push("client_id: must not contain blanks or line ends");
        }
        let has_secret = !self.client_secret.expose_secret().is_empty();
        if self.kind == CredentialKind::ClientSecret && has_secret && self.client_id.is_empty() {
            problems.push("client_id: must be the application's id, because client_secret is set");
        }
        problems
    }
}
