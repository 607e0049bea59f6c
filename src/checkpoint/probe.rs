//! Whether a store does what the protocol stands on: of several writers of one file exactly one creates it.
//!
//! Owns: trying that out with files of its own, which are gone afterwards. Does not own: what a checkpoint says. A store that
//! fails is refused by name; one that is only out of reach is tried again by the caller.

use bytes::Bytes;
use futures::future::join_all;
use object_store::ObjectStoreExt;
use uuid::Uuid;

use super::error::Error;
use super::files::{Created, Files};
use crate::storage::Location;

/// Stores whose check and write are two steps let a second writer through in one of three races or so.
const RACES: usize = 2;
const RACERS: usize = 8;

pub(super) async fn create_if_absent(location: &Location) -> Result<(), Error> {
    let files = Files::new(location.clone());
    let file = format!(".floe-probe-{}", Uuid::new_v4());
    let tried = twice(&files, location, &file).await;
    let tidied = files.delete(&file).await;
    tried.and(tidied)?;
    // For local files the file system itself decides, by a hard link.
    if location.url.starts_with("file:") {
        return Ok(());
    }
    for _ in 0..RACES {
        let file = format!(".floe-probe-{}", Uuid::new_v4());
        let racers = join_all((0..RACERS).map(|n| {
            let (files, file) = (&files, &file);
            async move { files.create(file, &format!("racer {n}").into()).await }
        }));
        // What met trouble has not won.
        let winners = racers.await.into_iter().filter(|created| matches!(created, Ok(Created::Ours))).count();
        files.delete(&file).await?;
        if winners > 1 {
            return Err(files.refused(format!(
                "of {RACERS} writers that created one file at the same time, each only if it is absent, {winners} were told \
                 that they had: the store's conditional put (If-None-Match: *) is not atomic, and exactly-once rests on it; \
                 {ADVICE}"
            )));
        }
    }
    Ok(())
}

const ADVICE: &str =
    "set checkpoint.location to a store with conditional puts (Amazon S3, for one), or to a local path";

async fn twice(files: &Files, location: &Location, file: &str) -> Result<(), Error> {
    let (first, second) = (Bytes::from_static(b"first"), Bytes::from_static(b"second"));
    if let Err(error) = files.create(file, &first).await {
        let Error::Transient { problem, .. } = &error else { return Err(error) };
        // Out of reach, or a store that knows no such put: then a plain one goes through.
        let path = location.prefix.clone().join(file);
        if location.store.put(&path, first.clone().into()).await.is_err() || files.delete(file).await.is_err() {
            return Err(error);
        }
        return match files.create(file, &first).await {
            Err(Error::Transient { .. }) => Err(files.refused(format!(
                "the store takes a plain put and fails one that creates a file only if it is absent (If-None-Match: *), which \
                 exactly-once rests on: {problem}; {ADVICE}"
            ))),
            // It was out of reach for a moment.
            _ => Err(error),
        };
    }
    match files.create(file, &second).await? {
        Created::Theirs(found) if found == first => Ok(()),
        _ => Err(files.refused(format!(
            "the store overwrites a file that was to be created only if it is absent: it does not heed If-None-Match: *, which \
             exactly-once rests on; {ADVICE}"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use async_trait::async_trait;
    use futures::stream::BoxStream;
    use object_store::memory::InMemory;
    use object_store::path::Path;
    use object_store::{
        CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, PutMode,
        PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
    };

    use super::*;
    use crate::error::Kind;

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Fails {
        Never,
        /// Overwrites whatever the mode.
        Heeding,
        /// Looks first and writes then.
        Atomicity,
        /// Fails any conditional put.
        Conditions,
        Everything,
    }

    #[derive(Debug)]
    struct Unfit(InMemory, Fails);

    impl std::fmt::Display for Unfit {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("unfit")
        }
    }

    #[async_trait]
    impl ObjectStore for Unfit {
        async fn put_opts(&self, path: &Path, payload: PutPayload, mut options: PutOptions) -> Result<PutResult> {
            let create = options.mode == PutMode::Create;
            match self.1 {
                Fails::Heeding => options.mode = PutMode::Overwrite,
                Fails::Atomicity if create && self.0.head(path).await.is_err() => {
                    tokio::task::yield_now().await;
                    options.mode = PutMode::Overwrite;
                }
                Fails::Conditions if create => {
                    return Err(object_store::Error::Generic { store: "unfit", source: "501 Not Implemented".into() });
                }
                Fails::Everything => {
                    return Err(object_store::Error::Generic { store: "unfit", source: "connection refused".into() });
                }
                _ => {}
            }
            self.0.put_opts(path, payload, options).await
        }

        async fn put_multipart_opts(&self, path: &Path, o: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
            self.0.put_multipart_opts(path, o).await
        }

        async fn get_opts(&self, path: &Path, options: GetOptions) -> Result<GetResult> {
            // What a slow store leaves between a look and the write after it.
            tokio::task::yield_now().await;
            self.0.get_opts(path, options).await
        }

        fn delete_stream(&self, paths: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
            self.0.delete_stream(paths)
        }

        fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
            self.0.list(prefix)
        }

        async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
            self.0.list_with_delimiter(prefix).await
        }

        async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
            self.0.copy_opts(from, to, options).await
        }
    }

    #[tokio::test]
    async fn only_a_store_with_one_winner_will_do_and_nothing_is_left_in_it() {
        for (fails, said) in [
            (Fails::Never, None),
            (Fails::Heeding, Some("overwrites a file")),
            (Fails::Atomicity, Some("is not atomic")),
            (Fails::Conditions, Some("501 Not Implemented")),
            (Fails::Everything, Some("connection refused")),
        ] {
            let store = Arc::new(Unfit(InMemory::new(), fails));
            let location =
                Location { store: store.clone(), prefix: Path::from("ck"), url: "s3://bucket/ck".to_string() };
            let found = create_if_absent(&location).await;
            match (said, found) {
                (None, Ok(())) => {}
                (Some(said), Err(error)) => {
                    assert!(error.to_string().contains(said), "{error}");
                    let kind = if fails == Fails::Everything { Kind::Transient } else { Kind::Fatal };
                    assert_eq!(error.kind(), kind, "{error}");
                    assert_eq!(kind == Kind::Fatal, error.to_string().contains(ADVICE), "{error}");
                }
                (_, found) => panic!("{fails:?}: {found:?}"),
            }
            let left = Files::new(location).list("").await.unwrap();
            assert!(left.is_empty(), "{fails:?} leaves {}", left[0].file);
        }
    }
}
