//! Credentials of the configuration, each as a credential of `azure_identity`.

use std::collections::BTreeMap;
use std::sync::Arc;

use azure_core::cloud::{CloudConfiguration, CustomConfiguration};
use azure_core::credentials::{Secret, TokenCredential};
use azure_core::http::{ClientOptions, RetryOptions, Transport};
use azure_identity::{
    ClientAssertionCredential, ClientAssertionCredentialOptions, ClientSecretCredential, ClientSecretCredentialOptions,
    ManagedIdentityCredential, ManagedIdentityCredentialOptions, UserAssignedId, WorkloadIdentityCredential,
    WorkloadIdentityCredentialOptions,
};
use reqwest::Client;
use secrecy::ExposeSecret;
use uuid::Uuid;

use super::client_assertion::{Assertion, Certificate};
use super::token_service::TokenServiceClient;
use crate::config::{CredentialConfig, CredentialKind, GraphConfig, credential_by_name};
use crate::graph::transport::metadata_client;

/// Credentials of the configuration, by name.
pub(super) struct Credentials {
    configs: BTreeMap<String, CredentialConfig>,
    authority: String,
    proxy: String,
    cloud: Arc<CloudConfiguration>,
}

impl Credentials {
    pub(super) fn new(config: &GraphConfig) -> Self {
        let mut cloud = CustomConfiguration::default();
        config.authority().clone_into(&mut cloud.authority_host);
        let authority = config.authority().to_owned();
        Self {
            configs: config.credentials.clone(),
            authority,
            proxy: config.proxy.clone(),
            cloud: Arc::new(cloud.into()),
        }
    }

    /// Creates the named credential for a tenant from the current content of its files. Errors are in our own words:
    /// the vendor's may quote the files.
    pub(super) fn create(
        &self,
        tenant_id: Uuid,
        name: &str,
        http: &TokenServiceClient,
    ) -> Result<Arc<dyn TokenCredential>, String> {
        let config =
            credential_by_name(&self.configs, name).ok_or("the configuration has no credential of that name")?;
        let tenant_id = tenant_id.to_string();
        match config.kind {
            CredentialKind::ClientSecret => self.client_secret(config, &tenant_id, http),
            CredentialKind::ClientCertificate => self.client_certificate(config, tenant_id, http),
            CredentialKind::WorkloadIdentity => self.workload_identity(config, tenant_id, http),
            CredentialKind::ManagedIdentity => self.managed_identity(config, http),
        }
    }

    /// HTTP client for a credential: the transport's for the token service, one of its own for the metadata service.
    pub(in crate::graph) fn client(&self, name: &str, http: &Client) -> Result<TokenServiceClient, String> {
        let is_local = credential_by_name(&self.configs, name)
            .is_some_and(|config| config.kind == CredentialKind::ManagedIdentity);
        let metadata = || metadata_client().map_err(|_| "cannot create an HTTP client".to_owned());
        if is_local {
            return Ok(TokenServiceClient::new(metadata()?, ""));
        }
        Ok(TokenServiceClient::new(http.clone(), &self.proxy))
    }

    /// Problems of every credential that show without a network, each with the key of its credential.
    pub(in crate::graph) fn problems(&self, http: &Client) -> Vec<String> {
        let problem = |(name, config): (&String, &CredentialConfig)| {
            if config.is_unset() || config.kind == CredentialKind::ManagedIdentity {
                return None;
            }
            let created = self.create(Uuid::nil(), name, &TokenServiceClient::new(http.clone(), &self.proxy));
            created.err().map(|problem| format!("graph.credentials.{name}: {problem}"))
        };
        self.configs.iter().filter_map(problem).collect()
    }

    fn options(&self, http: TokenServiceClient) -> ClientOptions {
        ClientOptions {
            cloud: Some(Arc::clone(&self.cloud)),
            transport: Some(Transport::new(Arc::new(http))),
            // Retries are made in token.rs, within the run's deadline.
            retry: RetryOptions::none(),
            ..ClientOptions::default()
        }
    }

    fn client_secret(
        &self,
        config: &CredentialConfig,
        tenant_id: &str,
        http: &TokenServiceClient,
    ) -> Result<Arc<dyn TokenCredential>, String> {
        let secret = config.read_client_secret().map_err(|error| error.to_string())?;
        let secret = Secret::new(secret.expose_secret().to_owned());
        let options = ClientSecretCredentialOptions { client_options: self.options(http.clone()) };
        match ClientSecretCredential::new(tenant_id, config.client_id.clone(), secret, Some(options)) {
            Ok(credential) => Ok(credential),
            Err(_) => Err("client_id or client_secret is empty".to_owned()),
        }
    }

    fn client_certificate(
        &self,
        config: &CredentialConfig,
        tenant_id: String,
        http: &TokenServiceClient,
    ) -> Result<Arc<dyn TokenCredential>, String> {
        let file = config.client_certificate_file.as_deref().ok_or("client_certificate_file is not set")?;
        let password = config.read_certificate_password().map_err(|error| error.to_string())?;
        let certificate = Certificate::read(file, config.client_key_file.as_deref(), password.expose_secret())?;
        let audience = format!("{}/{tenant_id}/oauth2/v2.0/token", self.authority);
        let assertion = Assertion::sign(&certificate, &config.client_id, &audience)?;
        let options = ClientAssertionCredentialOptions { client_options: self.options(http.clone()) };
        match ClientAssertionCredential::new(tenant_id, config.client_id.clone(), assertion, Some(options)) {
            Ok(credential) => Ok(credential),
            Err(_) => Err("client_id is empty".to_owned()),
        }
    }

    fn workload_identity(
        &self,
        config: &CredentialConfig,
        tenant_id: String,
        http: &TokenServiceClient,
    ) -> Result<Arc<dyn TokenCredential>, String> {
        let client_id =
            config.federated_client_id().ok_or("neither client_id nor the variable AZURE_CLIENT_ID is set")?;
        let file = config
            .federated_token_file()
            .ok_or("token_file is not set, and the variable AZURE_FEDERATED_TOKEN_FILE neither")?;
        let token = std::fs::read_to_string(&file)
            .map_err(|error| format!("cannot read the federated token in {}: {error}", file.display()))?;
        if token.trim().is_empty() {
            return Err(format!("the federated token in {} is empty", file.display()));
        }
        let options = WorkloadIdentityCredentialOptions {
            credential_options: ClientAssertionCredentialOptions { client_options: self.options(http.clone()) },
            client_id: Some(client_id),
            tenant_id: Some(tenant_id),
            token_file_path: Some(file),
        };
        match WorkloadIdentityCredential::new(Some(options)) {
            Ok(credential) => Ok(credential),
            Err(_) => Err("client_id or the federated token cannot be used".to_owned()),
        }
    }

    fn managed_identity(
        &self,
        config: &CredentialConfig,
        http: &TokenServiceClient,
    ) -> Result<Arc<dyn TokenCredential>, String> {
        let client_id = (!config.client_id.is_empty()).then(|| config.client_id.clone());
        let options = ManagedIdentityCredentialOptions {
            user_assigned_id: client_id.map(UserAssignedId::ClientId),
            client_options: self.options(http.clone()),
        };
        match ManagedIdentityCredential::new(Some(options)) {
            Ok(credential) => Ok(credential),
            Err(_) => Err("this machine has no managed identity of a supported kind".to_owned()),
        }
    }
}
