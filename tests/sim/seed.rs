//! Pseudorandom ids, names and decisions, derived from the seed so that runs are reproducible.

use uuid::Uuid;

const WORDS: [&str; 16] = [
    "Contoso",
    "Fabrikam",
    "Northwind",
    "Adatum",
    "Litware",
    "Proseware",
    "Tailspin",
    "Wingtip",
    "Woodgrove",
    "Trey",
    "Relecloud",
    "Lucerne",
    "Alpine",
    "Munson",
    "Margie",
    "Bellows",
];

/// Spreads the bits of a number over all 64 (the finisher of splitmix64).
pub fn mix(mut bits: u64) -> u64 {
    bits = bits.wrapping_add(0x9e37_79b9_7f4a_7c15);
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

/// Folds a text into a running hash.
pub fn fold_text(state: u64, text: &str) -> u64 {
    let folded = text
        .bytes()
        .fold(state ^ 0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    mix(folded)
}

/// The key of one concrete collection of one tenant: ids, names and links hang on it.
pub fn collection_key(seed: u64, tenant: Uuid, path: &str) -> u64 {
    let (high, low) = tenant.as_u64_pair();
    fold_text(mix(mix(seed ^ high) ^ low), path)
}

/// The GUID of the object at `index`; [`index_of`] finds the way back, so no table of ids is kept.
pub fn guid(key: u64, index: u32) -> Uuid {
    let high = (mix(key ^ u64::from(index)) & !0xf000) | 0x4000;
    let scatter = mix(high ^ key.rotate_left(17));
    let masked = u64::from(index ^ (scatter as u32));
    let low = (scatter & 0x3fff_ffff_0000_0000) | 0x8000_0000_0000_0000 | masked;
    Uuid::from_u64_pair(high, low)
}

/// The index that [`guid`] made this id from, if it was this key's.
pub fn index_of(key: u64, id: Uuid) -> Option<u32> {
    let (high, low) = id.as_u64_pair();
    let index = (low as u32) ^ (mix(high ^ key.rotate_left(17)) as u32);
    (guid(key, index) == id).then_some(index)
}

/// The made-up company that a tenant's object names carry.
pub fn tenant_word(seed: u64, tenant: Uuid) -> &'static str {
    let (high, low) = tenant.as_u64_pair();
    WORDS[(mix(seed ^ high ^ low.rotate_left(7)) % WORDS.len() as u64) as usize]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_leads_back_to_its_index_and_to_no_other_collection() {
        let key = collection_key(1, Uuid::from_u128(7), "beta/deviceManagement/intents");
        for index in [0, 1, 11, 70_000, u32::MAX] {
            let id = guid(key, index);
            assert_eq!(id.get_version_num(), 4);
            assert_eq!(index_of(key, id), Some(index));
            assert_eq!(index_of(key ^ 1, id), None);
        }
    }

    #[test]
    fn tenants_seeds_and_paths_have_different_ids() {
        let tenant = Uuid::from_u128(7);
        let id = guid(collection_key(1, tenant, "beta/a"), 0);
        assert_eq!(id, guid(collection_key(1, tenant, "beta/a"), 0));
        assert_ne!(id, guid(collection_key(2, tenant, "beta/a"), 0));
        assert_ne!(id, guid(collection_key(1, tenant, "beta/b"), 0));
        assert_ne!(id, guid(collection_key(1, Uuid::from_u128(8), "beta/a"), 0));
    }
}
