//! Page of a list: its objects, each marked as new or seen before.

use std::time::Instant;

use super::error::ListError;
use super::pager::{Pager, SeenIds};
use super::retry::Fetched;
use crate::domain::observation::Observation;

/// Page of a list.
#[derive(Debug)]
pub struct Page {
    /// Objects, in Graph's order.
    pub objects: Vec<PageObject>,
    /// Number of further elements that cannot be read, as those that are not JSON objects.
    pub bad_objects: usize,
    /// Time just before the successful request for this page was sent: the observation is not older.
    pub requested_at: Instant,
}

/// Object of a page.
#[derive(Debug)]
pub struct PageObject {
    /// The object as the run sees it.
    pub observation: Observation,
    /// `true` unless this listing has contained the id before: pages overlap when a list changes while it is read. An
    /// object without an id is always new.
    pub first_sight: bool,
}

impl Page {
    /// Marks the new objects of a fetched page, and checks that the list progresses.
    pub(super) fn new(
        parent: &str,
        (decoded, requested_at): Fetched,
        pager: &mut Pager,
        seen: &mut SeenIds,
    ) -> Result<Self, ListError> {
        let (mut ids, mut new_ids) = (0, 0);
        let mut objects = Vec::with_capacity(decoded.objects.len());
        for (id, observation) in decoded.objects {
            let first_sight = id.as_deref().is_none_or(|id| {
                let first_sight = seen.insert((parent, id));
                ids += 1;
                new_ids += usize::from(pager.is_progress((parent, id), first_sight));
                first_sight
            });
            objects.push(PageObject { observation, first_sight });
        }
        pager.check_progress(objects.is_empty(), ids, new_ids)?;
        Ok(Self { objects, bad_objects: decoded.bad_objects, requested_at })
    }
}
