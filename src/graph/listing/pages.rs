//! Pages of one list.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use super::children::{self, Children};
use super::decode;
use super::error::{ListError, Recovery};
use super::page::Page;
use super::pager::{Pager, SeenIds};
use crate::domain::catalog::Listing;
use crate::domain::failure::{ErrorCode, Failure};
use crate::domain::policy_type::Shape;
use crate::graph::client::GraphReader;

/// Reader of one list, page by page.
pub struct Pages {
    reader: GraphReader,
    listing: Arc<Listing>,
    /// Parents whose children are read at the same time.
    parents_at_once: usize,
    /// Of a child collection, once its parents are listed.
    children: Option<Children>,
    pager: Option<Pager>,
    /// Ids of this listing, each with its parent.
    seen: SeenIds,
    ended: bool,
}

impl GraphReader {
    /// Pages of a list, from first to last.
    #[must_use]
    pub fn pages(&self, listing: &Arc<Listing>) -> Pages {
        Pages {
            reader: self.clone(),
            listing: Arc::clone(listing),
            parents_at_once: children::PARENTS_AT_ONCE,
            children: None,
            pager: None,
            seen: SeenIds::default(),
            ended: false,
        }
    }
}

impl Pages {
    /// Sends one request at a time, and none before a page is asked for.
    pub(in crate::graph) fn one_by_one(self) -> Self {
        Self { parents_at_once: 1, ..self }
    }

    /// Fetches the next page; `None` after the last. An error ends the list.
    pub async fn next(&mut self) -> Result<Option<Page>, Failure> {
        self.next_page().await.map_err(|error| error.failure)
    }

    /// Does the same as `next`, with an error that names missing permissions.
    pub(in crate::graph) async fn next_page(&mut self) -> Result<Option<Page>, ListError> {
        if self.ended {
            return Ok(None);
        }
        let page = match self.listing.collection.shape {
            Shape::Singleton => self.singleton().await.map(Some),
            Shape::Collection => self.page_of_collection().await,
            Shape::ChildCollection => self.page_of_children().await,
        };
        self.ended = self.listing.collection.shape == Shape::Singleton || !matches!(page, Ok(Some(_)));
        page
    }

    async fn singleton(&mut self) -> Result<Page, ListError> {
        let (collection, started) = (&self.listing.collection, Instant::now());
        let mut pager = Pager::new(collection, &collection.path);
        match pager.next(&self.reader, &|body| decode::singleton(body, &self.listing)).await {
            Ok(Some(fetched)) => Page::new("", fetched, &mut pager, &mut self.seen),
            // Graph itself says that the tenant has no such object: the listing is complete and empty.
            Ok(None) | Err(ListError { recovery: Recovery::NotFound, .. }) => {
                Ok(Page { objects: Vec::new(), bad_objects: 0, requested_at: started })
            }
            Err(error) => Err(error),
        }
    }

    async fn page_of_collection(&mut self) -> Result<Option<Page>, ListError> {
        let collection = &self.listing.collection;
        let pager = self.pager.get_or_insert_with(|| Pager::new(collection, &collection.path));
        let Some(fetched) = pager.next(&self.reader, &|body| decode::collection(body, &self.listing)).await? else {
            return Ok(None);
        };
        Page::new("", fetched, pager, &mut self.seen).map(Some)
    }

    async fn page_of_children(&mut self) -> Result<Option<Page>, ListError> {
        if self.children.is_none() {
            let parents = self.list_parents().await?;
            self.children = Some(Children::new(&self.reader, &self.listing, parents, self.parents_at_once));
        }
        let Some(children) = &mut self.children else { return Ok(None) };
        children.next(&mut self.seen).await
    }

    /// Lists the parents. One without a usable id costs its children and no others: the listing ends with an error.
    async fn list_parents(&self) -> Result<(VecDeque<String>, Option<ListError>), ListError> {
        let mut failed_parent = None;
        let (mut pager, mut seen) = (Pager::of_parents(&self.listing.collection), SeenIds::default());
        let mut parents = VecDeque::new();
        while let Some(fetched) = pager.next(&self.reader, &decode::parents).await? {
            let ids: Vec<Option<String>> =
                fetched.0.objects.iter().map(|(id, _)| id.clone().map(String::from)).collect();
            let parsed = Page::new("", fetched, &mut pager, &mut seen)?;
            let is_usable = |id: &Option<String>| id.as_deref().is_some_and(children::is_path_segment);
            if parsed.bad_objects > 0 || !ids.iter().all(is_usable) {
                tracing::warn!(
                    path = self.listing.collection.parent,
                    "a parent has no usable id; its children are not listed"
                );
                failed_parent.get_or_insert_with(|| ErrorCode::GraphBadResponse.into());
            }
            let new = parsed.objects.iter().zip(ids).filter(|(object, _)| object.first_sight);
            parents.extend(new.filter_map(|(_, id)| id).filter(|id| children::is_path_segment(id)));
        }
        Ok((parents, failed_parent))
    }
}
