//! The `iceberg` crate's storage traits on [`crate::storage`], so that data, metadata and checkpoint share one stack.
//!
//! Owns: how a location in table metadata (`file:///…`, a bare path, `s3://…`) becomes a store and a path in it. The
//! location is taken literally, never percent-decoded, as PyIceberg and Java do.

use std::collections::HashMap;
use std::ops::Range;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use iceberg::io::{
    FileIO, FileIOBuilder, FileMetadata, FileRead, FileWrite, InputFile, OutputFile, Storage, StorageConfig,
    StorageFactory,
};
use iceberg::{Error, ErrorKind, Result};
use object_store::buffered::BufWriter;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use serde::{Deserialize, Serialize};
use tokio::io::AsyncWrite;

use super::vended::Vended;
use crate::error::chain;

/// Files up to this size go out in one request; larger ones in parts of it.
const PART_BYTES: usize = 8 << 20;
/// Parts of one file on their way at the same time: what bounds the memory of a slow store.
const PARTS_IN_FLIGHT: usize = 4;

/// Every store that a location has named so far, and what catalogs have vended. Clones share both.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct TableStorage {
    #[serde(skip)]
    stores: Arc<Mutex<HashMap<String, Arc<dyn ObjectStore>>>>,
    #[serde(skip)]
    vended: Arc<Vended>,
}

impl TableStorage {
    pub fn file_io(&self) -> FileIO {
        FileIOBuilder::new(Arc::new(self.clone())).build()
    }

    pub fn vended(&self) -> &Vended {
        &self.vended
    }

    /// With a store of the test's own for all locations that begin with `root`.
    #[cfg(test)]
    pub fn with_store(root: &str, store: Arc<dyn ObjectStore>) -> TableStorage {
        let stores = HashMap::from([(root.to_string(), store)]);
        TableStorage { stores: Arc::new(Mutex::new(stores)), ..TableStorage::default() }
    }

    /// The store that holds `location`, and the path in it.
    pub fn locate(&self, location: &str) -> Result<(Arc<dyn ObjectStore>, Path)> {
        let invalid = |message: String| Error::new(ErrorKind::DataInvalid, message).with_context("location", location);
        let (root, key) = match location.split_once("://") {
            Some(("file", path)) => ("file:///", path),
            Some((_, rest)) => match rest.split_once('/') {
                Some((_, key)) => (&location[..location.len() - key.len()], key),
                None => (location, ""),
            },
            None => ("file:///", location.strip_prefix("file:").unwrap_or(location)),
        };
        let path = Path::parse(key).map_err(|e| invalid(e.to_string()))?;
        if let Some((_, bucket)) = root.split_once("://").filter(|(scheme, _)| scheme.starts_with("s3"))
            && let Some(store) =
                self.vended.store(location, bucket.trim_end_matches('/')).map_err(|e| invalid(e.to_string()))?
        {
            return Ok((store, path));
        }
        let mut stores = self.stores.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(store) = stores.get(root) {
            return Ok((store.clone(), path));
        }
        let store = crate::storage::open(root).map_err(|e| invalid(e.to_string()))?.store;
        stores.insert(root.to_string(), store.clone());
        Ok((store, path))
    }
}

fn failed(location: &str, action: &str, source: object_store::Error) -> Error {
    Error::new(ErrorKind::Unexpected, format!("cannot {action} {location}: {}", chain(&source)))
}

#[typetag::serde(name = "floe")]
impl StorageFactory for TableStorage {
    fn build(&self, _config: &StorageConfig) -> Result<Arc<dyn Storage>> {
        Ok(Arc::new(self.clone()))
    }
}

#[async_trait]
#[typetag::serde(name = "floe")]
impl Storage for TableStorage {
    async fn exists(&self, path: &str) -> Result<bool> {
        let (store, key) = self.locate(path)?;
        match store.head(&key).await {
            Ok(_) => Ok(true),
            Err(object_store::Error::NotFound { .. }) => Ok(false),
            Err(e) => Err(failed(path, "look for", e)),
        }
    }

    async fn metadata(&self, path: &str) -> Result<FileMetadata> {
        let (store, key) = self.locate(path)?;
        let meta = store.head(&key).await.map_err(|e| failed(path, "look at", e))?;
        Ok(FileMetadata { size: meta.size })
    }

    async fn read(&self, path: &str) -> Result<Bytes> {
        let (store, key) = self.locate(path)?;
        let found = store.get(&key).await.map_err(|e| failed(path, "read", e))?;
        found.bytes().await.map_err(|e| failed(path, "read", e))
    }

    async fn reader(&self, path: &str) -> Result<Box<dyn FileRead>> {
        let (store, key) = self.locate(path)?;
        Ok(Box::new(Reader { location: path.to_string(), store, key }))
    }

    async fn write(&self, path: &str, bs: Bytes) -> Result<()> {
        let (store, key) = self.locate(path)?;
        store.put(&key, bs.into()).await.map_err(|e| failed(path, "write", e))?;
        Ok(())
    }

    async fn writer(&self, path: &str) -> Result<Box<dyn FileWrite>> {
        let (store, key) = self.locate(path)?;
        let inner = BufWriter::with_capacity(store, key, PART_BYTES).with_max_concurrency(PARTS_IN_FLIGHT);
        Ok(Box::new(Writer { location: path.to_string(), inner }))
    }

    async fn delete(&self, path: &str) -> Result<()> {
        let (store, key) = self.locate(path)?;
        match store.delete(&key).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(e) => Err(failed(path, "delete", e)),
        }
    }

    async fn delete_prefix(&self, path: &str) -> Result<()> {
        let (store, key) = self.locate(path)?;
        let mut listed = store.list(Some(&key));
        while let Some(meta) = listed.next().await {
            let meta = meta.map_err(|e| failed(path, "list", e))?;
            store.delete(&meta.location).await.map_err(|e| failed(path, "delete under", e))?;
        }
        Ok(())
    }

    async fn delete_stream(&self, mut paths: BoxStream<'static, String>) -> Result<()> {
        while let Some(path) = paths.next().await {
            self.delete(&path).await?;
        }
        Ok(())
    }

    fn new_input(&self, path: &str) -> Result<InputFile> {
        Ok(InputFile::new(Arc::new(self.clone()), path.to_string()))
    }

    fn new_output(&self, path: &str) -> Result<OutputFile> {
        Ok(OutputFile::new(Arc::new(self.clone()), path.to_string()))
    }
}

struct Reader {
    location: String,
    store: Arc<dyn ObjectStore>,
    key: Path,
}

#[async_trait]
impl FileRead for Reader {
    async fn read(&self, range: Range<u64>) -> Result<Bytes> {
        self.store.get_range(&self.key, range).await.map_err(|e| failed(&self.location, "read", e))
    }
}

struct Writer {
    location: String,
    inner: BufWriter,
}

#[async_trait]
impl FileWrite for Writer {
    async fn write(&mut self, bs: Bytes) -> Result<()> {
        self.inner.put(bs).await.map_err(|e| failed(&self.location, "write", e))
    }

    async fn close(&mut self) -> Result<()> {
        std::future::poll_fn(|cx| Pin::new(&mut self.inner).poll_shutdown(cx))
            .await
            .map_err(|e| Error::new(ErrorKind::Unexpected, format!("cannot write {}: {e}", self.location)))
    }
}
