//! Assignment of a listed object to the policy types of its listing.

use super::catalog::Listing;
use super::item::{BadObject, InventoryItem, RawObject};

/// Object of a list, as seen by a run.
#[derive(Debug)]
pub enum Observation {
    /// Item of the selected type with this index.
    Item(usize, InventoryItem),
    /// Object of the selected type with this index that cannot be stored.
    Bad(usize, BadObject),
    /// Object of a type that is not selected.
    NotSelected,
    /// Object that no type of the list claims.
    Unclassified,
}

impl Listing {
    /// Finds the type of an object and converts it, if the type is selected.
    #[must_use]
    pub fn observe(&self, object: &RawObject<'_>) -> Observation {
        let Some(claimed) = object.classify(&self.collection) else { return Observation::Unclassified };
        let Some(index) = self.selected.iter().position(|selected| selected.key == claimed.key) else {
            return Observation::NotSelected;
        };
        match object.observe(claimed) {
            Ok(item) => Observation::Item(index, item),
            Err(bad) => Observation::Bad(index, bad),
        }
    }
}
