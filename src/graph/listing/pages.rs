//! Pages of one list; of a child collection, parent by parent.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

use super::decode::{self, ObjectText};
use super::error::{ListError, Recovery};
use super::pager::{Pager, SeenIds};
use super::retry::Fetched;
use crate::domain::catalog::Collection;
use crate::domain::failure::{ErrorCode, Failure};
use crate::domain::policy_type::Shape;
use crate::graph::client::GraphReader;

/// Parents in a row whose children cannot be read before the list is given up: it is not one parent's fault.
const MAX_FAILED_IN_A_ROW: u32 = 10;

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
    /// JSON text, as Graph sent it.
    pub text: ObjectText,
    /// `true` unless this listing has contained the id before: pages overlap when a list changes while it is read. An
    /// object without an id is always new.
    pub first_sight: bool,
}

/// Reader of one list, page by page.
pub struct Pages {
    reader: GraphReader,
    collection: Arc<Collection>,
    /// Of a child collection: parents whose children are not read to the end.
    parents: Option<VecDeque<String>>,
    pager: Option<Pager>,
    /// Ids of this listing, each with its parent.
    seen: SeenIds,
    /// Error of the first parent whose children could not be read; reported after the others were read.
    failed_parent: Option<ListError>,
    failed_in_a_row: u32,
    ended: bool,
}

impl GraphReader {
    /// Pages of a list, from first to last.
    #[must_use]
    pub fn pages(&self, collection: &Arc<Collection>) -> Pages {
        Pages {
            reader: self.clone(),
            collection: Arc::clone(collection),
            parents: None,
            pager: None,
            seen: SeenIds::default(),
            failed_parent: None,
            failed_in_a_row: 0,
            ended: false,
        }
    }
}

impl Pages {
    /// Fetches the next page; `None` after the last. An error ends the list.
    pub async fn next(&mut self) -> Result<Option<Page>, Failure> {
        self.next_page().await.map_err(|error| error.failure)
    }

    /// Does the same as `next`, with an error that names missing permissions.
    pub(in crate::graph) async fn next_page(&mut self) -> Result<Option<Page>, ListError> {
        if self.ended {
            return Ok(None);
        }
        let page = match self.collection.shape {
            Shape::Singleton => self.singleton().await.map(Some),
            Shape::Collection => self.page_of_collection().await,
            Shape::ChildCollection => self.page_of_children().await,
        };
        self.ended = self.collection.shape == Shape::Singleton || !matches!(page, Ok(Some(_)));
        page
    }

    async fn singleton(&mut self) -> Result<Page, ListError> {
        let (id, started) = (id_property(&self.collection), Instant::now());
        let mut pager = Pager::new(&self.collection, &self.collection.path);
        match pager.next(&self.reader, &|body| decode::singleton(body, id)).await {
            Ok(Some(fetched)) => page("", fetched, &mut pager, &mut self.seen),
            // Graph itself says that the tenant has no such object: the listing is complete and empty.
            Ok(None) | Err(ListError { recovery: Recovery::NotFound, .. }) => {
                Ok(Page { objects: Vec::new(), bad_objects: 0, requested_at: started })
            }
            Err(error) => Err(error),
        }
    }

    async fn page_of_collection(&mut self) -> Result<Option<Page>, ListError> {
        let id = id_property(&self.collection);
        let pager = self.pager.get_or_insert_with(|| Pager::new(&self.collection, &self.collection.path));
        let Some(fetched) = pager.next(&self.reader, &|body| decode::collection(body, id)).await? else {
            return Ok(None);
        };
        page("", fetched, pager, &mut self.seen).map(Some)
    }

    async fn page_of_children(&mut self) -> Result<Option<Page>, ListError> {
        if self.parents.is_none() {
            self.parents = Some(self.list_parents().await?);
        }
        let id = id_property(&self.collection);
        let parents = self.parents.get_or_insert_default();
        while let Some(parent) = parents.front() {
            let path = || self.collection.path.replace("{parent_id}", &path_segment(parent));
            let pager = self.pager.get_or_insert_with(|| Pager::new(&self.collection, &path()));
            match pager.next(&self.reader, &|body| decode::collection(body, id)).await {
                Ok(Some(fetched)) => {
                    self.failed_in_a_row = 0;
                    return page(parent, fetched, pager, &mut self.seen).map(Some);
                }
                // Graph says that the parent was deleted after it was listed, and its children with it.
                Ok(None) | Err(ListError { recovery: Recovery::NotFound, .. }) => {}
                Err(error) if concerns_one_parent(&error.failure) && self.failed_in_a_row < MAX_FAILED_IN_A_ROW => {
                    self.failed_in_a_row += 1;
                    self.failed_parent.get_or_insert(error);
                }
                Err(error) => return Err(self.failed_parent.take().unwrap_or(error)),
            }
            parents.pop_front();
            self.pager = None;
        }
        self.failed_parent.take().map_or(Ok(None), Err)
    }

    /// Lists the parents. One without a usable id costs its children and no others: the listing ends with an error.
    async fn list_parents(&mut self) -> Result<VecDeque<String>, ListError> {
        let (mut pager, mut seen) = (Pager::of_parents(&self.collection), SeenIds::default());
        let mut parents = VecDeque::new();
        while let Some(fetched) = pager.next(&self.reader, &|body| decode::collection(body, "id")).await? {
            let ids: Vec<Option<String>> =
                fetched.0.objects.iter().map(|(_, id)| id.clone().map(String::from)).collect();
            let parsed = page("", fetched, &mut pager, &mut seen)?;
            let is_usable = |id: &Option<String>| id.as_deref().is_some_and(is_path_segment);
            if parsed.bad_objects > 0 || !ids.iter().all(is_usable) {
                tracing::warn!(path = self.collection.parent, "a parent has no usable id; its children are not listed");
                self.failed_parent.get_or_insert(ErrorCode::GraphBadResponse.into());
            }
            let new = parsed.objects.iter().zip(ids).filter(|(object, _)| object.first_sight);
            parents.extend(new.filter_map(|(_, id)| id).filter(|id| is_path_segment(id)));
        }
        Ok(parents)
    }
}

/// Returns `false` for an id that would change the path it is put into: URLs resolve `.` and `..`.
fn is_path_segment(id: &str) -> bool {
    !["", ".", ".."].contains(&id)
}

/// Returns `true` for a failure that says nothing about the children of other parents.
fn concerns_one_parent(failure: &Failure) -> bool {
    match failure.code {
        ErrorCode::GraphForbidden | ErrorCode::GraphBadRequest | ErrorCode::GraphBadResponse => true,
        ErrorCode::GraphUnavailable => matches!(failure.http_status, Some(500 | 501)),
        _ => false,
    }
}

/// Marks the new objects of a page, and checks that the list progresses.
fn page(
    parent: &str,
    (decoded, requested_at): Fetched,
    pager: &mut Pager,
    seen: &mut SeenIds,
) -> Result<Page, ListError> {
    let (mut ids, mut new_ids) = (0, 0);
    let mut objects = Vec::with_capacity(decoded.objects.len());
    for (text, id) in decoded.objects {
        let first_sight = id.as_deref().is_none_or(|id| {
            let first_sight = seen.insert((parent, id));
            ids += 1;
            new_ids += usize::from(pager.is_progress((parent, id), first_sight));
            first_sight
        });
        objects.push(PageObject { text, first_sight });
    }
    pager.check_progress(objects.is_empty(), ids, new_ids)?;
    Ok(Page { objects, bad_objects: decoded.bad_objects, requested_at })
}

/// Types that share a collection have their ids in the same property.
fn id_property(collection: &Collection) -> &str {
    collection.types.first().map_or("id", |policy_type| policy_type.id.as_str())
}

/// Bytes of an id that are escaped in a path: all but the unreserved characters of RFC 3986.
const ESCAPED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// Escapes an id so that it is one segment of a path.
fn path_segment(id: &str) -> String {
    utf8_percent_encode(id, ESCAPED).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_one_path_segment() {
        assert_eq!(path_segment("6a5b1a3e-3e24_x.1~"), "6a5b1a3e-3e24_x.1~");
        assert!(is_path_segment("a.b") && !is_path_segment(".") && !is_path_segment(".."));
        assert_eq!(path_segment("a/b?c#d e%ü"), "a%2Fb%3Fc%23d%20e%25%C3%BC");
    }
}
