//! Children of several parents, read concurrently and passed on in the order of the parents.

use std::collections::VecDeque;
use std::sync::Arc;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use tokio::task::JoinSet;
use tracing::Instrument;

use super::decode;
use super::error::{ListError, Recovery};
use super::page::Page;
use super::pager::{Pager, SeenIds};
use super::retry::Fetched;
use crate::domain::catalog::Listing;
use crate::domain::failure::{ErrorCode, Failure};
use crate::graph::client::GraphReader;

/// Parents whose children are read at the same time.
pub(super) const PARENTS_AT_ONCE: usize = 8;
/// Objects that may wait for those of earlier parents. Each parent may have one more page in flight.
const OBJECTS_AHEAD: usize = 1_000;
/// Parents in a row whose children cannot be read before the list is given up: it is not one parent's fault.
const MAX_FAILED_IN_A_ROW: u32 = 10;

/// Reader of the children of all parents.
pub(super) struct Children {
    reader: GraphReader,
    listing: Arc<Listing>,
    at_once: usize,
    /// Parents that are not begun.
    waiting: VecDeque<String>,
    /// Parents that are read, in order. The pages of the first one are passed on.
    begun: VecDeque<Parent>,
    /// Number of the first begun parent.
    first: usize,
    requests: JoinSet<Answer>,
    /// Error of the first parent whose children could not be read; reported after the others were read.
    failed_parent: Option<ListError>,
    failed_in_a_row: u32,
}

/// Parent whose children are being read.
struct Parent {
    id: String,
    /// `None` while a page is requested.
    pager: Option<Pager>,
    pages: VecDeque<Page>,
    end: Option<Result<(), ListError>>,
}

/// Response to the request of the parent with a number.
type Answer = (usize, Pager, Result<Option<Fetched>, ListError>);

impl Children {
    /// Reader of the children of `parents`. An error in their list is reported after their children were read.
    pub(super) fn new(
        reader: &GraphReader,
        listing: &Arc<Listing>,
        (parents, failed_parent): (VecDeque<String>, Option<ListError>),
        at_once: usize,
    ) -> Self {
        Self {
            reader: reader.clone(),
            listing: Arc::clone(listing),
            at_once,
            waiting: parents,
            begun: VecDeque::new(),
            first: 0,
            requests: JoinSet::new(),
            failed_parent,
            failed_in_a_row: 0,
        }
    }

    /// Next page in the order of the parents; `None` after the last.
    pub(super) async fn next(&mut self, seen: &mut SeenIds) -> Result<Option<Page>, ListError> {
        loop {
            self.send_requests();
            let Some(parent) = self.begun.front_mut() else { return self.failed_parent.take().map_or(Ok(None), Err) };
            if let Some(page) = parent.pages.pop_front() {
                self.failed_in_a_row = 0;
                return Ok(Some(page));
            }
            if let Some(end) = parent.end.take() {
                self.begun.pop_front();
                self.first += 1;
                self.parent_ended(end)?;
                continue;
            }
            match self.requests.join_next().await {
                Some(Ok(answer)) => self.answered(answer, seen),
                // Requests are aborted with `self` only, so this is a panic.
                Some(Err(error)) => std::panic::resume_unwind(error.into_panic()),
                None => unreachable!("the first parent has a page, an end or a request"),
            }
        }
    }

    /// Begins as many parents as allowed, and requests the next page of each unless too much waits already.
    fn send_requests(&mut self) {
        while self.begun.len() < self.at_once
            && let Some(id) = self.waiting.pop_front()
        {
            let collection = &self.listing.collection;
            let path = collection.path.replace("{parent_id}", &path_segment(&id));
            let pager = Some(Pager::new(collection, &path));
            self.begun.push_back(Parent { id, pager, pages: VecDeque::new(), end: None });
        }
        let pages = self.begun.iter().flat_map(|parent| &parent.pages);
        let has_room = pages.map(|page| page.objects.len()).sum::<usize>() < OBJECTS_AHEAD;
        for (index, parent) in self.begun.iter_mut().enumerate() {
            let is_awaited = index == 0 && parent.pages.is_empty();
            if parent.end.is_none()
                && (is_awaited || (has_room && self.at_once > 1))
                && let Some(pager) = parent.pager.take()
            {
                let (reader, listing) = (self.reader.clone(), Arc::clone(&self.listing));
                self.requests.spawn(fetch(self.first + index, pager, reader, listing).in_current_span());
            }
        }
    }

    fn answered(&mut self, (number, mut pager, fetched): Answer, seen: &mut SeenIds) {
        // Parents after one that ends the list were given up.
        let index = number - self.first;
        let Some(parent) = self.begun.get_mut(index) else { return };
        let page = match fetched {
            Ok(Some(fetched)) => Page::new(&parent.id, fetched, &mut pager, seen).map(Some),
            // Graph says that the parent was deleted after it was listed, and its children with it.
            Ok(None) | Err(ListError { recovery: Recovery::NotFound, .. }) => Ok(None),
            Err(error) => Err(error),
        };
        parent.pager = Some(pager);
        match page {
            Ok(Some(page)) => parent.pages.push_back(page),
            Ok(None) => parent.end = Some(Ok(())),
            Err(error) => {
                let ends_list = !concerns_one_parent(&error.failure);
                parent.end = Some(Err(error));
                if ends_list {
                    self.waiting.clear();
                    self.begun.truncate(index + 1);
                }
            }
        }
    }

    fn parent_ended(&mut self, end: Result<(), ListError>) -> Result<(), ListError> {
        let Err(error) = end else { return Ok(()) };
        if !concerns_one_parent(&error.failure) || self.failed_in_a_row >= MAX_FAILED_IN_A_ROW {
            return Err(self.failed_parent.take().unwrap_or(error));
        }
        self.failed_in_a_row += 1;
        self.failed_parent.get_or_insert(error);
        Ok(())
    }
}

async fn fetch(number: usize, mut pager: Pager, reader: GraphReader, listing: Arc<Listing>) -> Answer {
    let fetched = pager.next(&reader, &|body| decode::collection(body, &listing)).await;
    (number, pager, fetched)
}

/// Returns `true` for a failure that says nothing about the children of other parents.
fn concerns_one_parent(failure: &Failure) -> bool {
    match failure.code {
        ErrorCode::GraphForbidden | ErrorCode::GraphBadRequest | ErrorCode::GraphBadResponse => true,
        ErrorCode::GraphUnavailable => matches!(failure.http_status, Some(500 | 501)),
        _ => false,
    }
}

/// Returns `false` for an id that would change the path it is put into: URLs resolve `.` and `..`.
pub(super) fn is_path_segment(id: &str) -> bool {
    !["", ".", ".."].contains(&id)
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
