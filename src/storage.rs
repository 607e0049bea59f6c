//! One storage stack for checkpoint, state, metadata and data: `object_store`, with local files made durable.
//!
//! Owns: what a location string means, and that a local file is on disk, with the folders that lead to it, before a
//! write returns. Does not own: what is stored, or retries. Invariant: a file is either absent or complete, and of
//! racing create-if-absent writers one wins.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Write};
use std::ops::Range;
use std::path::{Component, Path as FsPath, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use object_store::aws::AmazonS3Builder;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, PutMode,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, RenameOptions, Result, UploadPart,
};
use uuid::Uuid;

/// A store and a place in it.
#[derive(Clone, Debug)]
pub struct Location {
    pub store: Arc<dyn ObjectStore>,
    pub prefix: Path,
    /// What the user wrote, made absolute: `file:///…` or `s3://…`; without a trailing slash.
    pub url: String,
}

#[derive(Debug, thiserror::Error)]
#[error("location {location:?}: {message}")]
pub struct OpenError {
    pub location: String,
    pub message: String,
}

/// Opens a local path (relative ones are relative to the working directory), a `file://` URL or `s3://bucket/prefix`.
/// S3 is configured by the usual environment: `AWS_ACCESS_KEY_ID`, `AWS_REGION`, `AWS_ENDPOINT`, `AWS_ALLOW_HTTP` …
/// Nothing is created or contacted yet.
pub fn open(location: &str) -> Result<Location, OpenError> {
    let fail = |message: String| OpenError { location: location.to_string(), message };
    let trimmed = location.trim_end_matches('/');
    if let Some(rest) = trimmed.strip_prefix("s3://").or_else(|| trimmed.strip_prefix("s3a://")) {
        let (bucket, key) = rest.split_once('/').unwrap_or((rest, ""));
        if bucket.is_empty() {
            return Err(fail("an S3 location needs a bucket: s3://bucket/prefix".into()));
        }
        let store = AmazonS3Builder::from_env().with_bucket_name(bucket).build().map_err(|e| fail(e.to_string()))?;
        let prefix = Path::parse(key).map_err(|e| fail(e.to_string()))?;
        return Ok(Location { store: Arc::new(store), prefix, url: trimmed.to_string() });
    }
    let path = match trimmed.strip_prefix("file:") {
        Some(rest) => rest.strip_prefix("//").unwrap_or(rest),
        None if location.contains("://") => {
            return Err(fail(
                "this scheme is not supported: use a local path, file:///path or s3://bucket/prefix".into(),
            ));
        }
        None if location.is_empty() => return Err(fail("it is empty".into())),
        None => trimmed,
    };
    let absolute =
        normalized(FsPath::new(if path.is_empty() { "/" } else { path })).map_err(|e| fail(e.to_string()))?;
    let text = absolute.to_str().ok_or_else(|| fail("the path is not valid UTF-8".into()))?;
    let prefix = Path::parse(text).map_err(|e| fail(e.to_string()))?;
    let url = format!("file://{}", text.trim_end_matches('/'));
    Ok(Location { store: Arc::new(DurableLocal { inner: Arc::new(LocalFileSystem::new()) }), prefix, url })
}

/// Absolute, with `.` and `..` taken out by name: what is not there yet cannot be asked for its real path.
fn normalized(path: &FsPath) -> io::Result<PathBuf> {
    let mut clean = PathBuf::new();
    for component in std::path::absolute(path)?.components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir => {
                clean.pop();
            }
            other => clean.push(other),
        }
    }
    Ok(clean)
}

/// `LocalFileSystem`, except that what it has written survives a power failure.
#[derive(Clone, Debug)]
struct DurableLocal {
    inner: Arc<LocalFileSystem>,
}

impl fmt::Display for DurableLocal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Durable{}", self.inner)
    }
}

#[async_trait]
impl ObjectStore for DurableLocal {
    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
        let create = match opts.mode {
            PutMode::Create => true,
            PutMode::Overwrite => false,
            PutMode::Update(_) => return self.inner.put_opts(location, payload, opts).await,
        };
        let file = self.inner.path_to_filesystem(location)?;
        blocking(location, move || put(&file, &payload, create)).await?;
        Ok(PutResult { e_tag: None, version: None })
    }

    async fn put_multipart_opts(&self, location: &Path, opts: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        let file = self.inner.path_to_filesystem(location)?;
        let folder = parent(&file).to_path_buf();
        blocking(location, move || create_folders(&folder)).await?;
        let inner = self.inner.put_multipart_opts(location, opts).await?;
        Ok(Box::new(DurableUpload { inner, location: location.clone(), file }))
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.inner.get_opts(location, options).await
    }

    async fn get_ranges(&self, location: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        self.inner.get_ranges(location, ranges).await
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.inner.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.inner.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }

    async fn rename_opts(&self, from: &Path, to: &Path, options: RenameOptions) -> Result<()> {
        self.inner.rename_opts(from, to, options).await
    }
}

#[derive(Debug)]
struct DurableUpload {
    inner: Box<dyn MultipartUpload>,
    location: Path,
    file: PathBuf,
}

#[async_trait]
impl MultipartUpload for DurableUpload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        self.inner.put_part(data)
    }

    /// The file has its name before it is synced; nothing names it elsewhere before this returns.
    async fn complete(&mut self) -> Result<PutResult> {
        let result = self.inner.complete().await?;
        let file = self.file.clone();
        blocking(&self.location, move || {
            File::open(&file)?.sync_all()?;
            sync_folder(parent(&file))
        })
        .await?;
        Ok(result)
    }

    async fn abort(&mut self) -> Result<()> {
        self.inner.abort().await
    }
}

async fn blocking(location: &Path, work: impl FnOnce() -> io::Result<()> + Send + 'static) -> Result<()> {
    tokio::task::spawn_blocking(work).await?.map_err(|source| {
        let path = location.to_string();
        match source.kind() {
            io::ErrorKind::AlreadyExists => object_store::Error::AlreadyExists { path, source: source.into() },
            io::ErrorKind::PermissionDenied => object_store::Error::PermissionDenied { path, source: source.into() },
            _ => object_store::Error::Generic { store: "local", source: format!("/{path}: {source}").into() },
        }
    })
}

fn put(file: &FsPath, payload: &PutPayload, create: bool) -> io::Result<()> {
    let folder = parent(file);
    create_folders(folder)?;
    // `#` and digits: the form that LocalFileSystem keeps for files in the making and leaves out of listings.
    let mut temp = file.as_os_str().to_owned();
    temp.push(format!("#{}", Uuid::new_v4().as_u128()));
    let temp = PathBuf::from(temp);
    let written = write_synced(&temp, payload).and_then(|()| match create {
        true => fs::hard_link(&temp, file),
        false => fs::rename(&temp, file),
    });
    if create || written.is_err() {
        // A leftover temporary file is invisible and harmless; the outcome of the put is what matters.
        let _ = fs::remove_file(&temp);
    }
    written?;
    sync_folder(folder)
}

fn write_synced(temp: &FsPath, payload: &PutPayload) -> io::Result<()> {
    let mut file = File::options().write(true).create_new(true).open(temp)?;
    for part in payload {
        file.write_all(part)?;
    }
    file.sync_all()
}

fn parent(file: &FsPath) -> &FsPath {
    match file.parent() {
        Some(folder) if folder.as_os_str().is_empty() => FsPath::new("."),
        Some(folder) => folder,
        None => FsPath::new("/"),
    }
}

/// Creates `folder` and those above it, each entered durably in its parent.
pub(crate) fn create_folders(folder: &FsPath) -> io::Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    create_folders(parent(folder))?;
    match fs::create_dir(folder) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists && folder.is_dir() => {}
        other => other?,
    }
    sync_folder(parent(folder))
}

fn sync_folder(folder: &FsPath) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::TryStreamExt;
    use object_store::ObjectStoreExt;

    fn create() -> PutOptions {
        PutOptions { mode: PutMode::Create, ..Default::default() }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn one_of_sixteen_racing_writers_creates_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let at = open(dir.path().join("new/folder").to_str().unwrap()).unwrap();
        for round in 0..20 {
            let path = at.prefix.clone().join(format!("{round}.json"));
            let racers = (0..16).map(|i| {
                let (store, path) = (at.store.clone(), path.clone());
                tokio::spawn(async move { store.put_opts(&path, format!("writer {i}").into(), create()).await })
            });
            let mut won = 0;
            for racer in racers.collect::<Vec<_>>() {
                match racer.await.unwrap() {
                    Ok(_) => won += 1,
                    Err(e) => assert!(matches!(e, object_store::Error::AlreadyExists { .. }), "{e}"),
                }
            }
            assert_eq!(won, 1);
        }
        let listed: Vec<_> = at.store.list(Some(&at.prefix)).try_collect().await.unwrap();
        assert_eq!(listed.len(), 20);
        assert_eq!(fs::read_dir(dir.path().join("new/folder")).unwrap().count(), 20, "no temporary file is left");
    }

    #[tokio::test]
    async fn overwrite_replaces_and_a_file_in_the_making_is_not_listed() {
        let dir = tempfile::tempdir().unwrap();
        let at = open(dir.path().to_str().unwrap()).unwrap();
        let path = at.prefix.clone().join("a");
        for text in ["one", "two"] {
            at.store.put(&path, text.into()).await.unwrap();
            assert_eq!(at.store.get(&path).await.unwrap().bytes().await.unwrap(), text);
        }
        fs::write(dir.path().join(format!("b#{}", Uuid::new_v4().as_u128())), "half").unwrap();
        let listed: Vec<_> = at.store.list(Some(&at.prefix)).try_collect().await.unwrap();
        assert_eq!(listed.iter().map(|m| m.location.clone()).collect::<Vec<_>>(), [path]);
    }

    #[tokio::test]
    async fn a_multipart_upload_appears_when_it_completes() {
        let dir = tempfile::tempdir().unwrap();
        let at = open(dir.path().to_str().unwrap()).unwrap();
        let path = at.prefix.clone().join("deep").join("file");
        let mut upload = at.store.put_multipart(&path).await.unwrap();
        upload.put_part("first ".into()).await.unwrap();
        upload.put_part("second".into()).await.unwrap();
        assert!(at.store.head(&path).await.is_err());
        upload.complete().await.unwrap();
        assert_eq!(at.store.get(&path).await.unwrap().bytes().await.unwrap(), "first second");
    }

    #[test]
    fn locations_become_absolute() {
        let cwd = std::env::current_dir().unwrap();
        assert_eq!(open("a/./b/../c/").unwrap().url, format!("file://{}/a/c", cwd.display()));
        assert_eq!(open("file:///x/y").unwrap().url, "file:///x/y");
        assert_eq!(open("file:///x/y").unwrap().prefix.as_ref(), "x/y");
        assert_eq!(open("/x y/%20").unwrap().url, "file:///x y/%20");
        assert!(open("ftp://x/y").unwrap_err().to_string().contains("not supported"));
        assert!(open("s3://").is_err());
        assert_eq!(parent(FsPath::new("catalog.db")), FsPath::new("."));
    }
}
