//! One storage stack for checkpoint, state, metadata and data: `object_store`, with local files made durable.

use std::sync::Arc;

use object_store::ObjectStore;
use object_store::path::Path;

/// A store and a place in it.
#[derive(Clone, Debug)]
pub struct Location {
    pub store: Arc<dyn ObjectStore>,
    pub prefix: Path,
    /// What the user wrote, made absolute: `file:///…` or `s3://…`; without a trailing slash.
    pub url: String,
}
