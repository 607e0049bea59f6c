//! Who runs this query: `owners/<epoch>.json`, the highest epoch owns it.
//!
//! Owns: claiming an epoch and noticing a higher one. Does not own: correctness, which rests on the create-if-absent logs
//! and the tables' markers; ownership only makes sure that of two processes one stops and says why.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::error::Error;
use super::files::{Created, Files, numbered};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Owner {
    pub epoch: u64,
    /// Tells two claims of one process apart.
    pub claim: Uuid,
    pub host: String,
    pub pid: u32,
    pub version: String,
    pub started_at: String,
}

/// Creates the next epoch; whoever loses a race for one tries the one after it. The owner before is read first: like any
/// other file of the checkpoint it is named when it is damaged.
pub(super) async fn claim(files: &Files) -> Result<u64, Error> {
    loop {
        let highest = files.numbers("owners").await?.last().copied().unwrap_or(0);
        if highest > 0
            && let Some((before, _)) = files.read_json::<Owner>(&numbered("owners", highest)).await?
        {
            tracing::info!(
                epoch = highest,
                host = before.host,
                pid = before.pid,
                started_at = before.started_at,
                "taking over from the owner before"
            );
        }
        let epoch = highest.checked_add(1).ok_or_else(|| files.damaged("owners/", "no epoch is left"))?;
        let file = numbered("owners", epoch);
        let owner = Owner {
            epoch,
            claim: Uuid::new_v4(),
            host: host(),
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_string(),
            started_at: jiff::Timestamp::now().to_string(),
        };
        if let Created::Ours = files.create(&file, &files.encode(&file, &owner)?).await? {
            return Ok(epoch);
        }
    }
}

/// Step 1 of every batch: a higher epoch ends this process. So does a missing own file: the checkpoint was deleted or
/// replaced under a running query.
pub(super) async fn check(files: &Files, ours: u64) -> Result<(), Error> {
    let epochs = files.numbers("owners").await?;
    let Some(epoch) = epochs.last().copied().filter(|highest| *highest > ours) else {
        if epochs.last() == Some(&ours) {
            return Ok(());
        }
        return Err(files.damaged(
            &numbered("owners", ours),
            "this process created the file and it is gone: the checkpoint was deleted or replaced under a running query",
        ));
    };
    let file = numbered("owners", epoch);
    let owner: Option<(Owner, _)> = files.read_json(&file).await?;
    let (host, pid, since) = match owner {
        Some((owner, _)) => (owner.host, owner.pid, owner.started_at),
        // Purged between the listing and now, by an even higher epoch.
        None => ("unknown".to_string(), 0, "unknown".to_string()),
    };
    Err(Error::OtherOwner { url: files.url().to_string(), ours, epoch, host, pid, since })
}

fn host() -> String {
    let mut name = [0u8; 256];
    // SAFETY: gethostname writes at most the given length into the buffer, which outlives the call.
    #[allow(unsafe_code)]
    let failed = unsafe { libc::gethostname(name.as_mut_ptr().cast(), name.len()) } != 0;
    let end = name.iter().position(|b| *b == 0).unwrap_or(name.len());
    if failed || end == 0 { "unknown".to_string() } else { String::from_utf8_lossy(&name[..end]).into_owned() }
}
