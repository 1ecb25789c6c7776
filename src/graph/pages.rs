//! One list, page by page; a child collection parent by parent.

use std::collections::VecDeque;
use std::sync::Arc;

use super::answer::{Refusal, Why};
use super::client::GraphReader;
use super::page::{self, ObjectText, Parsed};
use super::walk::{Met, Walk};
use crate::domain::catalog::Collection;
use crate::domain::failure::Failure;
use crate::domain::policy_type::Shape;

/// One page of a list.
#[derive(Debug)]
pub struct Page {
    /// Its objects, in Graph's order.
    pub objects: Vec<PageObject>,
    /// Time when it was requested.
    pub requested_at: std::time::Instant,
}

/// One object of a page, as Graph wrote it.
#[derive(Debug)]
pub struct PageObject {
    /// Its JSON text.
    pub text: ObjectText,
    /// Whether its id was not seen before in this listing: pages overlap when a list changes while it is read. An
    /// object without an id is always new.
    pub first_sight: bool,
}

/// The pages of one list; of a child collection, those of every parent in turn.
pub struct Pages {
    reader: GraphReader,
    collection: Arc<Collection>,
    /// Of a child collection: the parents whose children are not read to their end.
    parents: Option<VecDeque<String>>,
    walk: Option<Walk>,
    /// The ids of the listing, each with the parent it was found under.
    seen: Met,
    ended: bool,
}

impl GraphReader {
    /// The pages of a list, from its first to its last.
    #[must_use]
    pub fn pages(&self, collection: &Arc<Collection>) -> Pages {
        Pages::new(self.clone(), Arc::clone(collection))
    }
}

impl Pages {
    fn new(reader: GraphReader, collection: Arc<Collection>) -> Self {
        Self { reader, collection, parents: None, walk: None, seen: Met::default(), ended: false }
    }

    /// The next page, or nothing after the last.
    ///
    /// # Errors
    /// The failure that ends the list; nothing comes after it.
    pub async fn next(&mut self) -> Result<Option<Page>, Failure> {
        self.step().await.map_err(|refusal| refusal.failure)
    }

    /// The same, with everything that Graph said and that may be known.
    pub(super) async fn step(&mut self) -> Result<Option<Page>, Refusal> {
        if self.ended {
            return Ok(None);
        }
        let requested_at = std::time::Instant::now();
        let page = match self.collection.shape {
            Shape::Singleton => self.singleton().await.map(Some),
            Shape::Collection => self.page_of_collection().await,
            Shape::ChildCollection => self.page_of_children().await,
        };
        self.ended = self.collection.shape == Shape::Singleton || !matches!(page, Ok(Some(_)));
        page.map(|page| page.map(|page| Page { requested_at, ..page }))
    }

    async fn singleton(&mut self) -> Result<Page, Refusal> {
        let id = id_property(&self.collection);
        let mut walk = Walk::new(&self.collection, &self.collection.path);
        match walk.step(&self.reader, &|body| page::singleton(body, id)).await {
            Ok(Some(parsed)) => page("", parsed, &mut walk, &mut self.seen),
            // The object does not exist in this tenant: that is the whole answer.
            Ok(None) | Err(Refusal { why: Why::NotFound, .. }) => {
                Ok(Page { objects: Vec::new(), requested_at: std::time::Instant::now() })
            }
            Err(refusal) => Err(refusal),
        }
    }

    async fn page_of_collection(&mut self) -> Result<Option<Page>, Refusal> {
        let id = id_property(&self.collection);
        let walk = self.walk.get_or_insert_with(|| Walk::new(&self.collection, &self.collection.path));
        let Some(parsed) = walk.step(&self.reader, &|body| page::collection(body, id)).await? else {
            return Ok(None);
        };
        page("", parsed, walk, &mut self.seen).map(Some)
    }

    async fn page_of_children(&mut self) -> Result<Option<Page>, Refusal> {
        if self.parents.is_none() {
            self.parents = Some(self.list_parents().await?);
        }
        let id = id_property(&self.collection);
        let parents = self.parents.get_or_insert_default();
        while let Some(parent) = parents.front() {
            let path = || self.collection.path.replace("{parent_id}", &encoded(parent));
            let walk = self.walk.get_or_insert_with(|| Walk::new(&self.collection, &path()));
            match walk.step(&self.reader, &|body| page::collection(body, id)).await {
                Ok(Some(parsed)) => return page(parent, parsed, walk, &mut self.seen).map(Some),
                // Without an answer the parent was deleted after it was listed, and its children with it.
                Ok(None) | Err(Refusal { why: Why::NotFound, .. }) => {}
                Err(refusal) => return Err(refusal),
            }
            parents.pop_front();
            self.walk = None;
        }
        Ok(None)
    }

    async fn list_parents(&self) -> Result<VecDeque<String>, Refusal> {
        let (mut walk, mut seen) = (Walk::of_parents(&self.collection), Met::default());
        let mut parents = VecDeque::new();
        while let Some(parsed) = walk.step(&self.reader, &|body| page::collection(body, "id")).await? {
            let ids: Vec<Option<String>> = parsed.objects.iter().map(|(_, id)| id.clone()).collect();
            let objects = page("", parsed, &mut walk, &mut seen)?.objects;
            let new = objects.iter().zip(ids).filter(|(object, _)| object.first_sight).filter_map(|(_, id)| id);
            // A dot alone would change the path that it is put into.
            parents.extend(new.filter(|id| !["", ".", ".."].contains(&id.as_str())));
        }
        Ok(parents)
    }
}

/// Marks what is new on a page, and judges whether the list gets on.
fn page(parent: &str, parsed: Parsed, walk: &mut Walk, seen: &mut Met) -> Result<Page, Refusal> {
    let (mut ids, mut new_ids) = (0, 0);
    let mut objects = Vec::with_capacity(parsed.objects.len());
    for (text, id) in parsed.objects {
        let first_sight = id.as_deref().is_none_or(|id| {
            let first_sight = seen.first_time((parent, id));
            ids += 1;
            new_ids += usize::from(first_sight);
            first_sight
        });
        objects.push(PageObject { text, first_sight });
    }
    walk.check_progress(objects.is_empty(), ids, new_ids)?;
    Ok(Page { objects, requested_at: std::time::Instant::now() })
}

/// Types that share a collection have their ids in the same property.
fn id_property(collection: &Collection) -> &str {
    collection.types.first().map_or("id", |policy_type| policy_type.id.as_str())
}

/// An id as one segment of a path.
fn encoded(id: &str) -> String {
    let mut segment = String::with_capacity(id.len());
    for byte in id.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            segment.push(char::from(byte));
        } else {
            segment.push_str(&format!("%{byte:02X}"));
        }
    }
    segment
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_stays_within_its_segment() {
        assert_eq!(encoded("6a5b1a3e-3e24_x.1~"), "6a5b1a3e-3e24_x.1~");
        assert_eq!(encoded("a/b?c#d e%ü"), "a%2Fb%3Fc%23d%20e%25%C3%BC");
    }
}
