//! A certificate's word in place of a secret: the assertion that Microsoft's token service takes, signed with PS256.

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

use crate::domain::clock::wall_clock_unix_s;

/// How long an assertion is good; it is used at once.
const GOOD_FOR_S: i64 = 600;

/// A certificate with its private key.
pub(super) struct Certificate {
    thumbprint: String,
    key: Arc<dyn SigningKey>,
}

/// A signed assertion. Its `Debug` does not show it.
pub(super) struct Assertion(String);

impl Certificate {
    /// Reads a PEM file with a certificate, and its key from there or from a file of its own.
    pub(super) fn read(certificate: &Path, key: Option<&Path>) -> Result<Self, String> {
        let read = |path: &Path| std::fs::read(path).map_err(|error| format!("can't read {}: {error}", path.display()));
        let pem = read(certificate)?;
        let key_path = key.unwrap_or(certificate);
        let key_pem = read(key_path)?;
        let key = PrivateKeyDer::from_pem_slice(&key_pem)
            .map_err(|_| format!("there is no unencrypted private key in {}", key_path.display()))?;
        let key = any_supported_type(&key).map_err(|_| format!("the key in {} is no RSA key", key_path.display()))?;
        // A file may hold a whole chain in any order: ours is the one that the key belongs to.
        let own = CertificateDer::pem_slice_iter(&pem)
            .filter_map(Result::ok)
            .find(|one| CertifiedKey::new(vec![one.clone()], Arc::clone(&key)).keys_match().is_ok())
            .ok_or_else(|| format!("no certificate in {} belongs to the key", certificate.display()))?;
        Ok(Self { thumbprint: encode_url_safe(Sha256::digest(own.as_ref())), key })
    }
}

impl Assertion {
    /// Says, and signs, that the application `client_id` speaks to the token endpoint `audience`.
    pub(super) fn sign(certificate: &Certificate, client_id: &str, audience: &str) -> Result<Self, String> {
        let now = wall_clock_unix_s();
        let header = json!({ "alg": "PS256", "typ": "JWT", "x5t#S256": certificate.thumbprint });
        let claims = json!({
            "aud": audience, "iss": client_id, "sub": client_id, "jti": Uuid::new_v4(),
            "nbf": now, "iat": now, "exp": now + GOOD_FOR_S,
        });
        let signed = format!("{}.{}", encode_url_safe(header.to_string()), encode_url_safe(claims.to_string()));
        let signer =
            certificate.key.choose_scheme(&[SignatureScheme::RSA_PSS_SHA256]).ok_or("its key is no RSA key")?;
        let signature = signer.sign(signed.as_bytes()).map_err(|_| "its key does not sign")?;
        Ok(Self(format!("{signed}.{}", encode_url_safe(signature))))
    }
}

impl std::fmt::Debug for Assertion {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Assertion")
    }
}

/// Written out where the vendor's trait uses a macro of a crate that is needed for nothing else.
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
    /// What stands before the key itself in the public key of any 2,048-bit RSA key.
    const SPKI_PREFIX_BYTES: usize = 24;

    fn json(part: &str) -> Value {
        serde_json::from_slice(&decode_url_safe(part).unwrap()).unwrap()
    }

    #[test]
    fn the_assertion_has_its_claims_and_a_signature_that_holds() {
        let certificate = Certificate::read(Path::new(FIXTURE), None).unwrap();
        let assertion = Assertion::sign(&certificate, "app-id", AUDIENCE).unwrap();
        let parts: Vec<&str> = assertion.0.split('.').collect();
        let (header, claims) = (json(parts[0]), json(parts[1]));
        assert_eq!(header, serde_json::json!({ "alg": "PS256", "typ": "JWT", "x5t#S256": THUMBPRINT }));
        assert_eq!(
            (&claims["aud"], &claims["iss"], &claims["sub"]),
            (&AUDIENCE.into(), &"app-id".into(), &"app-id".into())
        );
        assert_eq!(claims["exp"].as_i64().unwrap() - claims["nbf"].as_i64().unwrap(), GOOD_FOR_S);
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
    fn what_is_wrong_with_the_files_is_said_without_quoting_them() {
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
        let stranger = file("other.crt", &pem[..own_begins]);
        let key = file("tls.key", &pem[key_begins..]);
        assert_eq!(Certificate::read(&chain, Some(&key)).map(|read| read.thumbprint), Ok(THUMBPRINT.to_owned()));
        let problem = |certificate: &Path, key: Option<&Path>| Certificate::read(certificate, key).err().unwrap();
        assert!(problem(&chain, None).contains("no unencrypted private key in"));
        assert!(problem(&stranger, Some(&key)).contains("belongs to the key"));
        assert!(problem(&folder.join("none.pem"), None).contains("can't read"));
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
