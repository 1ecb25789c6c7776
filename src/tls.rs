//! TLS provider of this process. Several clients use rustls, which panics at the first handshake unless exactly one
//! provider is installed.

use std::error::Error;
use std::io;

/// Installs the provider; keeps one that is already installed.
pub fn install_provider() {
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// First error of a type in a chain of sources. Clients wrap the error of a handshake in I/O errors, which pass over what they
/// wrap when asked for their source.
pub(crate) fn find_error<'a, T: Error + 'static>(error: &'a (dyn Error + 'static)) -> Option<&'a T> {
    let mut layer = Some(error);
    while let Some(error) = layer {
        if let Some(found) = error.downcast_ref::<T>() {
            return Some(found);
        }
        layer = match error.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
            Some(inner) => Some(inner),
            None => error.source(),
        };
    }
    None
}
