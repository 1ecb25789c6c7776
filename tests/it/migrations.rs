//! Migrations are append-only: a database remembers the checksum of each one that was applied to it.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use sha2::{Digest, Sha256};

/// Files that databases have been migrated with, and their SHA-256. A change of the schema is a new file, added here.
const RELEASED: &[(&str, &str)] =
    &[("0001_inventory.sql", "a189f48ef9b6348209d5f44455523f0ee2f570a320f4e51bb1e7ea865dd60687")];

#[test]
fn migrations_are_append_only() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("migrations");
    let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let found: BTreeMap<String, String> = files
        .filter(|path| path.extension().is_some_and(|extension| extension == "sql"))
        .map(|path| {
            let checksum = Sha256::digest(fs::read(&path).unwrap());
            let hex = checksum.iter().map(|byte| format!("{byte:02x}")).collect();
            (path.file_name().unwrap().to_str().unwrap().to_owned(), hex)
        })
        .collect();
    let released: BTreeMap<String, String> =
        RELEASED.iter().map(|(name, checksum)| ((*name).to_owned(), (*checksum).to_owned())).collect();
    assert_eq!(found, released, "add a new migration instead of changing one that was applied");
}
