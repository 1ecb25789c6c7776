//! TLS to the broker: whom we trust, who we are, and which name the broker has to prove.

use std::io;
use std::path::Path;

use async_rs::traits::Reactor;
use async_rs::{Tokio, TokioRuntime};
use lapin::tcp::{AsyncTcpStream, OwnedIdentity, OwnedTLSConfig};
use lapin::uri::{AMQPScheme, AMQPUri};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use super::error::BrokerError;
use crate::config::BrokerConfig;

/// The socket to the broker, with or without TLS.
pub(super) type Stream = AsyncTcpStream<<Tokio as Reactor>::TcpStream>;

/// What TLS connections are made with; the files are read once.
#[derive(Clone)]
pub(super) struct Tls {
    config: OwnedTLSConfig,
    /// The name that the broker's certificate must be for; its host's if none is set.
    server_name: Option<String>,
}

impl Tls {
    /// Reads the files that the configuration names.
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

    /// Opens a connection, through TLS where the address asks for that.
    pub(super) async fn connect(&self, uri: &AMQPUri, runtime: &TokioRuntime) -> io::Result<Stream> {
        let host = &uri.authority.host;
        let addresses = runtime.to_socket_addrs((host.clone(), uri.authority.port));
        let stream = AsyncTcpStream::connect(runtime, addresses).await?;
        match uri.scheme {
            AMQPScheme::AMQP => Ok(stream),
            AMQPScheme::AMQPS => stream.into_tls(self.server_name.as_ref().unwrap_or(host), self.config.as_ref()).await,
        }
    }
}

/// A broker refuses a client's certificate, or the lack of one, after its own side of the handshake is done, and often hangs up
/// before its reason arrives.
pub(super) fn explain(uri: &AMQPUri, error: io::Error) -> io::Error {
    match uri.scheme {
        AMQPScheme::AMQP => error,
        AMQPScheme::AMQPS => io::Error::new(
            error.kind(),
            format!("{error}; if the broker wants a certificate of its clients, see broker.client_certificate_file"),
        ),
    }
}

/// The text of a file that holds certificates: the client skips over one that holds none.
fn certificates(key: &str, file: &Path) -> Result<String, BrokerError> {
    let text = read(key, file)?;
    match CertificateDer::pem_slice_iter(text.as_bytes()).collect::<Result<Vec<_>, _>>() {
        Ok(found) if !found.is_empty() => Ok(text),
        Ok(_) => Err(refuse(key, file, "holds no certificate in PEM form")),
        Err(error) => Err(refuse(key, file, &error.to_string())),
    }
}

fn private_key(key: &str, file: &Path) -> Result<String, BrokerError> {
    let text = read(key, file)?;
    // Its error says what was looked for and quotes nothing.
    PrivateKeyDer::from_pem_slice(text.as_bytes())
        .map_err(|error| refuse(key, file, &format!("holds no unencrypted private key: {error}")))?;
    Ok(text)
}

fn read(key: &str, file: &Path) -> Result<String, BrokerError> {
    std::fs::read_to_string(file).map_err(|error| refuse(key, file, &error.to_string()))
}

fn refuse(key: &str, file: &Path, problem: &str) -> BrokerError {
    BrokerError::Config(format!("{key}: {}: {problem}", file.display()))
}
