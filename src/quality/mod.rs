//! Whether what is read is good enough to go on: expectations beyond the schema, and the circuit breaker.
//!
//! Owns: what an expectation asks of a row and what becomes of one that fails it (`expectation`); when so many records
//! are refused that a batch is held back (`breaker`). Both are pure. Does not own: SQL ([`crate::transform::sql`]), where
//! refused rows go ([`crate::execute`]), how a query waits while it is held back ([`crate::query`]).
//! Invariants: an expectation holds for a row only when it is true; every row that fails one is counted under its name; a
//! batch that the breaker holds back has left nothing in any table.

mod breaker;
mod expectation;

pub use breaker::{Breaker, Sample, Trip};
pub use expectation::{Checked, Expectation, Expectations, Violation};
