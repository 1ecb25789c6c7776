//! TLS provider of this process. Several clients use rustls, which panics at the first handshake unless exactly one
//! provider is installed.

/// Installs the provider; keeps one that is already installed.
pub fn install_provider() {
    let _ = rustls::crypto::ring::default_provider().install_default();
}
