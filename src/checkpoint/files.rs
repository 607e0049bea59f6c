//! The files of a checkpoint: names, the checksummed JSON envelope, and create-if-absent writes.
//!
//! Owns: how bytes get into and out of the store, and how an unknown outcome is cleared up by looking. Does not own: what
//! the files mean. Invariants: a file is written once and never edited; what is read is exactly what was written, or an
//! error names the file.

use std::ops::Range;

use bytes::Bytes;
use futures::TryStreamExt;
use object_store::path::Path;
use object_store::{ObjectStoreExt, PutMode, PutOptions};
use serde::Serialize;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};

use super::error::{ADVICE, Error};
use crate::error::chain;
use crate::storage::Location;

#[derive(Clone, Debug)]
pub(super) struct Files {
    location: Location,
}

pub(super) enum Created {
    /// The file is there, with our bytes: written now, or by an earlier attempt of ours whose answer was lost.
    Ours,
    /// The file is there with other bytes.
    Theirs(Bytes),
}

pub(super) struct Entry {
    /// Relative to the checkpoint, such as `offsets/00000000000000000007.json`.
    pub file: String,
    pub bytes: u64,
}

impl Files {
    pub fn new(location: Location) -> Files {
        Files { location }
    }

    pub fn url(&self) -> &str {
        &self.location.url
    }

    fn path(&self, file: &str) -> Path {
        file.split('/').fold(self.location.prefix.clone(), |path, part| path.join(part))
    }

    pub fn transient(&self, file: &str, problem: impl ToString) -> Error {
        Error::Transient { url: self.url().to_string(), file: file.to_string(), problem: problem.to_string() }
    }

    pub fn damaged(&self, file: &str, problem: impl std::fmt::Display) -> Error {
        Error::Damaged { url: self.url().to_string(), file: file.to_string(), problem: format!("{problem}; {ADVICE}") }
    }

    pub fn refused(&self, problem: impl ToString) -> Error {
        Error::Refused { url: self.url().to_string(), problem: problem.to_string() }
    }

    /// Tests arm these points; see [`crate::failpoint`].
    pub fn failpoint(&self, point: &str, file: &str) -> Result<(), Error> {
        if crate::failpoint::hit(point) { Err(self.transient(file, format!("failpoint {point}"))) } else { Ok(()) }
    }

    /// Writes a file that must not be there yet. Whatever the store answers, success included only when it says so
    /// plainly, the truth is what can be read back: a put that was retried below us finds its own bytes.
    pub async fn create(&self, file: &str, bytes: &Bytes) -> Result<Created, Error> {
        let path = self.path(file);
        let put = self.location.store.put_opts(&path, bytes.clone().into(), PutOptions::from(PutMode::Create)).await;
        let error = match put {
            Ok(_) => return Ok(Created::Ours),
            Err(e) => e,
        };
        if matches!(error, object_store::Error::NotImplemented { .. } | object_store::Error::NotSupported { .. }) {
            return Err(self.refused(format!(
                "this store cannot create a file only if it is absent, which exactly-once rests on; use another location: {error}"
            )));
        }
        match self.read(file).await {
            Ok(Some(found)) if found == *bytes => Ok(Created::Ours),
            Ok(Some(found)) => Ok(Created::Theirs(found)),
            Ok(None) => Err(self.transient(file, format!("cannot write: {}", chain(&error)))),
            Err(_) => Err(Error::Indeterminate {
                url: self.url().to_string(),
                file: file.to_string(),
                problem: chain(&error),
            }),
        }
    }

    pub async fn read(&self, file: &str) -> Result<Option<Bytes>, Error> {
        let result = match self.location.store.get(&self.path(file)).await {
            Ok(found) => found.bytes().await,
            Err(e) => Err(e),
        };
        match result {
            Ok(bytes) => Ok(Some(bytes)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(e) => Err(self.transient(file, format!("cannot read: {}", chain(&e)))),
        }
    }

    /// Parts of a file, each as long as asked for, or nothing when there is no such file or it is too short for them.
    pub async fn read_ranges(&self, file: &str, ranges: &[Range<u64>]) -> Result<Option<Vec<Bytes>>, Error> {
        let error = match self.location.store.get_ranges(&self.path(file), ranges).await {
            Ok(parts) if parts.iter().zip(ranges).all(|(part, r)| part.len() as u64 == r.end - r.start) => {
                return Ok(Some(parts));
            }
            Ok(_) | Err(object_store::Error::NotFound { .. }) => return Ok(None),
            Err(e) => e,
        };
        // A range beyond the end is an error of its own kind in every store: its length tells.
        match self.size(file).await {
            Ok(Some(size)) if ranges.iter().all(|r| r.end <= size) => {
                Err(self.transient(file, format!("cannot read: {}", chain(&error))))
            }
            Ok(_) => Ok(None),
            Err(e) => Err(e),
        }
    }

    pub async fn size(&self, file: &str) -> Result<Option<u64>, Error> {
        match self.location.store.head(&self.path(file)).await {
            Ok(meta) => Ok(Some(meta.size)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(e) => Err(self.transient(file, format!("cannot read: {}", chain(&e)))),
        }
    }

    /// The files directly in a folder, or everywhere below the checkpoint when the folder is empty; in order.
    pub async fn list(&self, folder: &str) -> Result<Vec<Entry>, Error> {
        let prefix = if folder.is_empty() { self.location.prefix.clone() } else { self.path(folder) };
        let metas: Vec<_> = match self.location.store.list(Some(&prefix)).try_collect().await {
            Ok(metas) => metas,
            Err(object_store::Error::NotFound { .. }) => Vec::new(),
            Err(e) => return Err(self.transient(&format!("{folder}/"), format!("cannot list: {}", chain(&e)))),
        };
        let mut entries: Vec<Entry> = metas
            .into_iter()
            .filter_map(|meta| {
                let parts: Vec<_> = meta.location.prefix_match(&self.location.prefix)?.collect();
                let file = parts.iter().map(|p| p.as_ref()).collect::<Vec<_>>().join("/");
                (folder.is_empty() || parts.len() == 2).then_some(Entry { file, bytes: meta.size })
            })
            .collect();
        entries.sort_by(|a, b| a.file.cmp(&b.file));
        Ok(entries)
    }

    /// The numbers of a folder's numbered files, in order. Other names are not ours and mean nothing here.
    pub async fn numbers(&self, folder: &str) -> Result<Vec<u64>, Error> {
        Ok(self.list(folder).await?.iter().filter_map(|entry| number_of(&entry.file)).collect())
    }

    /// A file that is gone already is as good as deleted.
    pub async fn delete(&self, file: &str) -> Result<(), Error> {
        match self.location.store.delete(&self.path(file)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(e) => Err(self.transient(file, format!("cannot delete: {}", chain(&e)))),
        }
    }

    pub async fn read_json<T: DeserializeOwned>(&self, file: &str) -> Result<Option<(T, Bytes)>, Error> {
        let Some(bytes) = self.read(file).await? else { return Ok(None) };
        Ok(Some((self.decode(file, &bytes)?, bytes)))
    }

    pub fn decode<T: DeserializeOwned>(&self, file: &str, bytes: &[u8]) -> Result<T, Error> {
        let line = open_envelope(bytes).map_err(|problem| self.damaged(file, problem))?;
        serde_json::from_slice(line).map_err(|e| {
            self.damaged(
                file,
                format!(
                    "its checksum is right but this version of Floe cannot read it ({e}); run the version that wrote it"
                ),
            )
        })
    }

    pub fn encode<T: Serialize>(&self, file: &str, value: &T) -> Result<Bytes, Error> {
        let mut bytes = serde_json::to_vec(value).map_err(|e| self.refused(format!("cannot encode {file}: {e}")))?;
        let checksum = digest(&bytes);
        bytes.push(b'\n');
        bytes.extend_from_slice(checksum.as_bytes());
        bytes.push(b'\n');
        Ok(bytes.into())
    }
}

/// `sha256:<lowercase hex>`.
pub(super) fn digest(bytes: &[u8]) -> String {
    format!("sha256:{:x}", Sha256::digest(bytes))
}

/// The JSON line of `<line>\nsha256:<hex>\n`; nothing else passes.
fn open_envelope(bytes: &[u8]) -> Result<&[u8], &'static str> {
    let newline = bytes.iter().position(|b| *b == b'\n').ok_or("the file is damaged: it has no complete first line")?;
    let (line, rest) = (&bytes[..newline], &bytes[newline + 1..]);
    if rest != format!("{}\n", digest(line)).as_bytes() {
        return Err("the file is damaged: its bytes do not match its checksum line");
    }
    Ok(line)
}

/// Twenty digits hold any u64, so that names sort as their numbers do.
pub(super) fn numbered(folder: &str, number: u64) -> String {
    format!("{folder}/{number:020}.json")
}

fn number_of(file: &str) -> Option<u64> {
    let (folder, name) = file.rsplit_once('/')?;
    let number = name.strip_suffix(".json")?.parse().ok()?;
    (numbered(folder, number) == file).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_sort_as_numbers_and_only_canonical_names_count() {
        assert_eq!(numbered("offsets", 7), "offsets/00000000000000000007.json");
        assert_eq!(number_of(&numbered("offsets", u64::MAX)), Some(u64::MAX));
        for other in
            ["offsets/7.json", "offsets/00000000000000000007.json.bak", "offsets/+0000000000000000007.json", "x"]
        {
            assert_eq!(number_of(other), None, "{other}");
        }
    }

    #[test]
    fn only_exactly_one_line_and_its_checksum_pass() {
        let good = format!("{{}}\n{}\n", digest(b"{}"));
        assert_eq!(open_envelope(good.as_bytes()), Ok(&b"{}"[..]));
        for bad in [
            String::new(),
            "{}".into(),
            good.trim_end().into(),
            format!("{good}\n"),
            good.to_uppercase(),
            format!("\n{good}"),
        ] {
            assert!(open_envelope(bad.as_bytes()).is_err(), "{bad:?}");
        }
    }
}
