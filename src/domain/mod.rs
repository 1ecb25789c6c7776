//! Domain types and rules: pure, no async, no I/O.

pub mod catalog;
pub mod clock;
mod credential_scan;
pub mod dead_letter;
pub mod event;
pub mod failure;
pub mod item;
mod message_fields;
pub mod observation;
mod platform;
pub mod policy_type;
mod raw_object;
pub mod request;
pub mod run;
pub mod selection;
