//! The only user of the `iceberg` crate.
