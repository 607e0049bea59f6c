//! One integration binary; a module a promise.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../support/mod.rs"]
mod support;

mod source; // exactly the planned ranges, whatever brokers, transactions and retention do
