//! temporary
use crate::domain::{clock::Deadline, failure::Failure, policy_type::Collection, run::GraphUsage};
use std::sync::Arc;
use std::time::Duration;
use uuid::Uuid;
/// t
#[derive(Debug, Clone)]
pub struct GraphClient;
/// t
#[derive(Debug, Clone)]
pub struct GraphReader;
/// t
pub struct Pages;
/// t
pub struct Page {
    /// t
    pub objects: Vec<PageObject>,
}
/// t
pub struct PageObject {
    /// t
    pub raw: Box<serde_json::value::RawValue>,
    /// t
    pub first_sight: bool,
}
/// t
pub struct RunBudget {
    /// t
    pub deadline: Deadline,
    /// t
    pub throttle_budget: Duration,
}
impl GraphClient {
    /// t
    pub fn reader(&self, _: Uuid, _: &str, _: RunBudget) -> GraphReader {
        GraphReader
    }
}
impl GraphReader {
    /// t
    pub fn pages(&self, _: &Arc<Collection>) -> Pages {
        Pages
    }
    /// t
    pub fn usage(&self) -> GraphUsage {
        GraphUsage::default()
    }
    /// t
    pub fn retry_after_s(&self) -> Option<i32> {
        None
    }
}
impl Pages {
    /// t
    pub async fn next(&mut self) -> Result<Option<Page>, Failure> {
        Ok(None)
    }
}
