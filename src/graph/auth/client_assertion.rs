//! Client assertion: a JWT signed with a certificate's key (PS256), in place of a client secret.
//!
//! `azure_identity` has a certificate credential, but only on top of OpenSSL; here `rustls` signs.

use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;

use azure_core::base64::encode_url_safe;
use azure_core::http::ClientMethodOptions;
use azure_identity::ClientAssertion;
use rustls::SignatureScheme;
use rustls::crypto::ring::sign::any_supported_type;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::{CertifiedKey, SigningKey};
use serde_json::json;
use sha2::{Digest, Sha256};
use uuid::Uuid;

use super::pkcs12;
use crate::domain::clock::wall_clock_unix_s;

/// Lifetime of an assertion; it is used at once.
const LIFETIME_S: i64 = 600;

/// Certificate with its private key.
pub(super) struct Certificate {
    thumbprint: String,
    key: Arc<dyn SigningKey>,
}

/// Signed assertion. `Debug` does not show it.
pub(super) struct Assertion(String);

impl Certificate {
    /// Reads a certificate and its key from a PKCS#12 file, or from a PEM file, whose key may be in another file.
    pub(super) fn read(certificate: &Path, key: Option<&Path>, password: &str) -> Result<Self, String> {
        let file = read_file(certificate)?;
        if !pkcs12::is_der(&file) {
            return Self::read_pem(certificate, &file, key.unwrap_or(certificate));
        }
        if key.is_some() {
            return Err(format!("{} contains its own key; remove client_key_file", certificate.display()));
        }
        let found = pkcs12::read(&file, password).map_err(|problem| format!("{} {problem}", certificate.display()))?;
        Self::of(certificate, &signing_key(certificate, &found.key)?, found.certificates)
    }

    fn read_pem(certificate: &Path, pem: &[u8], key_file: &Path) -> Result<Self, String> {
        let key_pem = read_file(key_file)?;
        let is_encrypted = ["ENCRYPTED PRIVATE KEY", "Proc-Type: 4,ENCRYPTED"]
            .iter()
            .any(|mark| key_pem.windows(mark.len()).any(|part| part == mark.as_bytes()));
        if is_encrypted {
            return Err(format!(
                "the private key in {} is encrypted; decrypt it with `openssl pkey -in FILE -out FILE`",
                key_file.display()
            ));
        }
        let key =
            PrivateKeyDer::from_pem_slice(&key_pem).map_err(|_| format!("no private key in {}", key_file.display()))?;
        let key = signing_key(key_file, &key)?;
        Self::of(certificate, &key, CertificateDer::pem_slice_iter(pem).filter_map(Result::ok).collect())
    }

    /// Certificate that matches the key: a file may contain a chain in any order.
    fn of(file: &Path, key: &Arc<dyn SigningKey>, certificates: Vec<CertificateDer<'static>>) -> Result<Self, String> {
        if certificates.is_empty() {
            return Err(format!("no certificate in {}", file.display()));
        }
        let own = certificates
            .into_iter()
            .find(|one| CertifiedKey::new(vec![one.clone()], Arc::clone(key)).keys_match().is_ok())
            .ok_or_else(|| format!("no certificate in {} matches the key", file.display()))?;
        Ok(Self { thumbprint: encode_url_safe(Sha256::digest(own.as_ref())), key: Arc::clone(key) })
    }
}

fn read_file(path: &Path) -> Result<Vec<u8>, String> {
    std::fs::read(path).map_err(|error| format!("cannot read {}: {error}", path.display()))
}

fn signing_key(file: &Path, key: &PrivateKeyDer<'_>) -> Result<Arc<dyn SigningKey>, String> {
    any_supported_type(key).map_err(|_| format!("the key in {} is not an RSA key", file.display()))
}

impl Assertion {
    /// Signs an assertion of the application `client_id` for the token endpoint `audience`.
    pub(super) fn sign(certificate: &Certificate, client_id: &str, audience: &str) -> Result<Self, String> {
        let now = wall_clock_unix_s();
        let header = json!({ "alg": "PS256", "typ": "JWT", "x5t#S256": certificate.thumbprint });
        let claims = json!({
            "aud": audience, "iss": client_id, "sub": client_id, "jti": Uuid::new_v4(),
            "nbf": now, "iat": now, "exp": now + LIFETIME_S,
        });
        let signed = format!("{}.{}", encode_url_safe(header.to_string()), encode_url_safe(claims.to_string()));
        let signer =
            certificate.key.choose_scheme(&[SignatureScheme::RSA_PSS_SHA256]).ok_or("the key is not an RSA key")?;
        let signature = signer.sign(signed.as_bytes()).map_err(|_| "signing failed")?;
        Ok(Self(format!("{signed}.{}", encode_url_safe(signature))))
    }
}

impl std::fmt::Debug for Assertion {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Assertion")
    }
}

/// Spelled out because the vendor's trait uses a macro of a crate that nothing else here needs.
impl ClientAssertion for Assertion {
    fn secret<'this, 'options, 'answer>(
        &'this self,
        _: Option<ClientMethodOptions<'options>>,
    ) -> Pin<Box<dyn Future<Output = azure_core::Result<String>> + Send + 'answer>>
    where
        'this: 'answer,
        'options: 'answer,
        Self: 'answer,
    {
        Box::pin(std::future::ready(Ok(self.0.clone())))
    }
}

#[cfg(test)]
mod tests {
    use azure_core::base64::decode_url_safe;
    use rustls::crypto::ring::default_provider;
    use serde_json::Value;

    use super::*;

    const FIXTURE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/credentials/application.pem");
    const AUDIENCE: &str = "https://login.example/6a5b1a3e-3e24-4d1c-9d7b-0c3f1a2b3c4d/oauth2/v2.0/token";
    /// From `openssl x509 -outform DER | openssl dgst -sha256 -binary | basenc --base64url`.
    const THUMBPRINT: &str = "ownxODo0RJH_m0kVceKa27125C7AnTUOURN2js9sbH0";
    /// Length of the header before the key itself in the public key of a 2,048-bit RSA key.
    const SPKI_PREFIX_BYTES: usize = 24;

    fn json(part: &str) -> Value {
        serde_json::from_slice(&decode_url_safe(part).unwrap()).unwrap()
    }

    #[test]
    fn an_assertion_has_its_claims_and_a_valid_signature() {
        let certificate = Certificate::read(Path::new(FIXTURE), None, "").unwrap();
        let assertion = Assertion::sign(&certificate, "app-id", AUDIENCE).unwrap();
        let parts: Vec<&str> = assertion.0.split('.').collect();
        let (header, claims) = (json(parts[0]), json(parts[1]));
        assert_eq!(header, serde_json::json!({ "alg": "PS256", "typ": "JWT", "x5t#S256": THUMBPRINT }));
        assert_eq!(
            (&claims["aud"], &claims["iss"], &claims["sub"]),
            (&AUDIENCE.into(), &"app-id".into(), &"app-id".into())
        );
        assert_eq!(claims["exp"].as_i64().unwrap() - claims["nbf"].as_i64().unwrap(), LIFETIME_S);
        assert!(Uuid::try_parse(claims["jti"].as_str().unwrap()).is_ok());

        let algorithms = default_provider().signature_verification_algorithms;
        let (_, ps256) =
            algorithms.mapping.iter().find(|(scheme, _)| *scheme == SignatureScheme::RSA_PSS_SHA256).unwrap();
        let public_key = certificate.key.public_key().unwrap();
        let (signed, signature) = assertion.0.rsplit_once('.').unwrap();
        let signature = decode_url_safe(signature).unwrap();
        let verify = |message: &[u8]| ps256[0].verify_signature(&public_key[SPKI_PREFIX_BYTES..], message, &signature);
        assert!(verify(signed.as_bytes()).is_ok());
        assert!(verify(b"something else").is_err());
        assert!(!format!("{assertion:?}").contains(parts[2]));
    }

    #[test]
    fn a_pkcs12_file_is_the_same_certificate_as_its_pem_file() {
        let pfx = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/credentials/application.pfx"));
        let certificate = Certificate::read(pfx, None, "fixture-password").unwrap();
        assert_eq!(certificate.thumbprint, THUMBPRINT);
        assert!(Assertion::sign(&certificate, "app-id", AUDIENCE).is_ok());
        let problem = Certificate::read(pfx, None, "hunter2").err().unwrap();
        assert!(problem.contains("application.pfx") && !problem.contains("hunter2"), "{problem}");
    }

    #[test]
    fn file_problems_are_reported_without_quoting_the_files() {
        let pem = std::fs::read_to_string(FIXTURE).unwrap();
        let key_begins = pem.find("-----BEGIN PRIVATE KEY-----").unwrap();
        let own_begins = pem.rfind("-----BEGIN CERTIFICATE-----").unwrap();
        let folder = std::env::temp_dir().join(format!("inventoryd-assertion-{}", Uuid::new_v4()));
        std::fs::create_dir(&folder).unwrap();
        let file = |name: &str, text: &str| {
            let path = folder.join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let chain = file("tls.crt", &pem[..key_begins]);
        let foreign = file("other.crt", &pem[..own_begins]);
        let key = file("tls.key", &pem[key_begins..]);
        assert_eq!(Certificate::read(&chain, Some(&key), "").map(|read| read.thumbprint), Ok(THUMBPRINT.to_owned()));
        let problem = |certificate: &Path, key: Option<&Path>| Certificate::read(certificate, key, "").err().unwrap();
        assert!(problem(&chain, None).contains("no private key in"));
        assert!(problem(&key, Some(&key)).contains("no certificate in"));
        let other = file("app.cer", "0\u{1}\u{2}");
        assert!(problem(&other, None).contains("neither a PEM nor a PKCS#12"));
        assert!(problem(&other, Some(&key)).contains("remove client_key_file"));
        let encrypted =
            file("encrypted.key", "-----BEGIN ENCRYPTED PRIVATE KEY-----\nMII\n-----END ENCRYPTED PRIVATE KEY-----");
        assert!(problem(&chain, Some(&encrypted)).contains("is encrypted"));
        assert!(problem(&foreign, Some(&key)).contains("matches the key"));
        assert!(problem(&folder.join("none.pem"), None).contains("cannot read"));
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
