//! TLS to the broker: trust anchors, client certificate and expected server name.

use std::io;
use std::path::Path;

use async_rs::TokioRuntime;
use lapin::tcp::{AsyncTcpStream, OwnedIdentity, OwnedTLSConfig};
use lapin::uri::{AMQPScheme, AMQPUri};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use super::error::BrokerError;
use super::guarded_stream::BrokerSocket;
use crate::config::BrokerConfig;

/// TLS settings; the files are read once, at start.
#[derive(Clone)]
pub(super) struct Tls {
    config: OwnedTLSConfig,
    /// Name expected in the broker's certificate; by default the host of the address.
    server_name: Option<String>,
}

impl Tls {
    /// Reads the files named in the configuration.
    pub(super) fn read(config: &BrokerConfig) -> Result<Self, BrokerError> {
        let cert_chain = config.ca_file.as_deref().map(|file| certificates("broker.ca_file", file)).transpose()?;
        let identity = config.client_certificate_file.as_deref().map(|file| {
            let pem = certificates("broker.client_certificate_file", file)?;
            let key = match config.client_key_file.as_deref() {
                Some(file) => private_key("broker.client_key_file", file)?,
                None => private_key("broker.client_certificate_file", file)?,
            };
            Ok(OwnedIdentity::PKCS8 { pem: pem.into_bytes(), key: key.into_bytes() })
        });
        let server_name = (!config.server_name.is_empty()).then(|| config.server_name.clone());
        Ok(Self { config: OwnedTLSConfig { identity: identity.transpose()?, cert_chain }, server_name })
    }

    /// Opens a TCP connection, with TLS for `amqps` addresses.
    pub(super) async fn connect(&self, uri: &AMQPUri, runtime: &TokioRuntime) -> io::Result<BrokerSocket> {
        let host = &uri.authority.host;
        let addresses = runtime.to_socket_addrs((host.clone(), uri.authority.port));
        let stream = AsyncTcpStream::connect(runtime, addresses).await?;
        match uri.scheme {
            AMQPScheme::AMQP => Ok(stream),
            AMQPScheme::AMQPS => stream.into_tls(self.server_name.as_ref().unwrap_or(host), self.config.as_ref()).await,
        }
    }
}

/// Reads a PEM file that must contain a certificate; the client would silently accept a file without one.
fn certificates(key: &str, file: &Path) -> Result<String, BrokerError> {
    let text = read(key, file)?;
    match CertificateDer::pem_slice_iter(text.as_bytes()).collect::<Result<Vec<_>, _>>() {
        Ok(found) if !found.is_empty() => Ok(text),
        Ok(_) => Err(refuse(key, file, "contains no PEM certificate")),
        Err(error) => Err(refuse(key, file, &error.to_string())),
    }
}

fn private_key(key: &str, file: &Path) -> Result<String, BrokerError> {
    let text = read(key, file)?;
    // The parser's error quotes nothing of the file.
    PrivateKeyDer::from_pem_slice(text.as_bytes())
        .map_err(|error| refuse(key, file, &format!("contains no unencrypted private key: {error}")))?;
    Ok(text)
}

fn read(key: &str, file: &Path) -> Result<String, BrokerError> {
    std::fs::read_to_string(file).map_err(|error| refuse(key, file, &error.to_string()))
}

fn refuse(key: &str, file: &Path, problem: &str) -> BrokerError {
    BrokerError::Config(format!("{key}: {}: {problem}", file.display()))
}
