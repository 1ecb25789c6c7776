//! Certificates of a test: an authority and the certificates it signs.

use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};

/// Certificate authority with a folder for its files; the folder is removed on drop.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    folder: PathBuf,
}

impl Authority {
    /// Creates an authority; its own certificate is `ca.pem`.
    pub fn new(name: &str) -> Self {
        let folder = super::target().join("test").join(format!("{name}-certificates"));
        std::fs::create_dir_all(&folder).expect("target can be written");
        let key = KeyPair::generate().expect("a key is generated");
        let mut params = CertificateParams::new(Vec::new()).expect("an empty list of names is valid");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.distinguished_name.push(DnType::CommonName, name);
        let certificate = params.self_signed(&key).expect("the certificate is signed");
        let authority = Self { issuer: Issuer::new(params, key), folder };
        authority.write("ca.pem", &certificate.pem());
        authority
    }

    /// Signs a certificate for a host: `<file>.pem`, with the key in `<file>.key`.
    pub fn issue(&self, file: &str, host: &str) {
        let key = KeyPair::generate().expect("a key is generated");
        let mut params = CertificateParams::new(vec![host.to_owned()]).expect("the name is valid");
        params.distinguished_name.push(DnType::CommonName, host);
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = params.signed_by(&key, &self.issuer).expect("the certificate is signed");
        self.write(&format!("{file}.pem"), &certificate.pem());
        self.write(&format!("{file}.key"), &key.serialize_pem());
    }

    /// Folder of the certificate files.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Path of one of the files.
    pub fn file(&self, name: &str) -> String {
        self.folder.join(name).to_str().expect("the checkout has a path in UTF-8").to_owned()
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.folder.join(name), text).expect("target can be written");
    }
}

impl Drop for Authority {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}
