//! PKCS#12 files (.pfx, .p12): a private key with its certificates, protected by a password.

use p12_keystore::error::Error;
use p12_keystore::{KeyStore, KeyStoreEntry, PrivateKeyChain};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

/// First byte of a DER file; no PEM file begins with it.
const DER_SEQUENCE: u8 = 0x30;

/// Private key of a file, with the certificates of its chain.
pub(super) struct KeyWithChain {
    pub(super) key: PrivateKeyDer<'static>,
    pub(super) certificates: Vec<CertificateDer<'static>>,
}

/// Returns `true` for a file that may be PKCS#12 and is not PEM.
pub(super) fn is_der(file: &[u8]) -> bool {
    file.first() == Some(&DER_SEQUENCE)
}

/// Reads the only key of a file. Errors follow the name of the file and quote nothing of it.
pub(super) fn read(file: &[u8], password: &str) -> Result<KeyWithChain, String> {
    let store = KeyStore::from_pkcs12(file, password).map_err(|error| describe(&error, password.is_empty()))?;
    let chains: Vec<&PrivateKeyChain> = store
        .entries()
        .filter_map(|(_, entry)| match entry {
            KeyStoreEntry::PrivateKeyChain(chain) => Some(chain),
            KeyStoreEntry::Certificate(_) | KeyStoreEntry::Secret(_) => None,
        })
        .collect();
    match chains.as_slice() {
        [chain] => Ok(KeyWithChain {
            key: PrivatePkcs8KeyDer::from(chain.key().to_vec()).into(),
            certificates: chain.chain().iter().map(|one| CertificateDer::from(one.as_der().to_vec())).collect(),
        }),
        [] => Err("contains no private key with its certificate; export both to one file".to_owned()),
        several => Err(format!("contains {} private keys; export the application's alone", several.len())),
    }
}

fn describe(error: &Error, password_is_empty: bool) -> String {
    let text = match error {
        // A file without a checksum shows a wrong password by what is decrypted.
        Error::MacError(_) | Error::Pkcs5Error(_) | Error::UnpadError if password_is_empty => {
            "is protected by a password; set client_certificate_password or client_certificate_password_file"
        }
        Error::MacError(_) | Error::Pkcs5Error(_) | Error::UnpadError => {
            "cannot be opened with client_certificate_password: the password is wrong"
        }
        Error::UnsupportedEncryptionScheme | Error::UnsupportedMacAlgorithm => {
            "uses an unsupported encryption or checksum; export it again with AES-256 and SHA-256"
        }
        _ => "is neither a PEM nor a PKCS#12 file, or is damaged",
    };
    text.to_owned()
}

#[cfg(test)]
mod tests {
    use p12_keystore::{Certificate, EncryptionAlgorithm, MacAlgorithm, PrivateKeyChain};
    use rustls::pki_types::pem::PemObject;

    use super::*;

    const PEM: &[u8] = include_bytes!("../../../tests/fixtures/credentials/application.pem");
    /// Made by `openssl pkcs12 -export -in application.pem -out application.pfx`.
    const PFX: &[u8] = include_bytes!("../../../tests/fixtures/credentials/application.pfx");
    const PASSWORD: &str = "fixture-password";

    fn chain(id: &str) -> PrivateKeyChain {
        let key = PrivateKeyDer::from_pem_slice(PEM).unwrap();
        let own = CertificateDer::pem_slice_iter(PEM).last().unwrap().unwrap();
        PrivateKeyChain::new(key.secret_der(), id, [Certificate::from_der(&own).unwrap()])
    }

    fn problem(file: &[u8], password: &str) -> String {
        read(file, password).err().unwrap()
    }

    #[test]
    fn a_file_of_openssl_yields_the_key_and_its_certificate() {
        let found = read(PFX, PASSWORD).unwrap();
        assert_eq!(found.key, PrivateKeyDer::from_pem_slice(PEM).unwrap());
        assert_eq!(found.certificates[0].as_ref(), chain("x").chain()[0].as_der());
    }

    #[test]
    fn files_of_older_programs_are_read() {
        let mut store = KeyStore::new();
        store.add_entry("application", KeyStoreEntry::PrivateKeyChain(chain("1")));
        for password in [PASSWORD, "", "pässwörd"] {
            let file = store
                .writer(password)
                .encryption_algorithm(EncryptionAlgorithm::PbeWithShaAnd3KeyTripleDesCbc)
                .mac_algorithm(MacAlgorithm::HmacSha1)
                .write()
                .unwrap();
            assert!(read(&file, password).is_ok(), "{password:?}");
        }
    }

    #[test]
    fn each_problem_of_a_file_is_named() {
        assert!(problem(PFX, "hunter2").contains("the password is wrong"));
        assert!(problem(PFX, "").contains("set client_certificate_password"));
        let mut store = KeyStore::new();
        let file = |store: &KeyStore| store.writer(PASSWORD).write().unwrap();
        store.add_entry("ca", KeyStoreEntry::Certificate(chain("1").chain()[0].clone()));
        assert!(problem(&file(&store), PASSWORD).contains("no private key"));
        store.add_entry("one", KeyStoreEntry::PrivateKeyChain(chain("1")));
        store.add_entry("two", KeyStoreEntry::PrivateKeyChain(chain("2")));
        assert!(problem(&file(&store), PASSWORD).contains("2 private keys"));
        let certificate = chain("1").chain()[0].as_der().to_vec();
        for other in [&certificate[..], &PFX[..PFX.len() / 2], b"0\x01\x02"] {
            assert!(is_der(other) && problem(other, PASSWORD).contains("neither a PEM nor a PKCS#12"));
        }
    }
}
