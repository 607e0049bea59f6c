//! Looking at the checkpoint of a query that may be running.

use crate::checkpoint::{Checkpoint, Recovered};
use crate::error::Error;

/// How often a service may finish a batch under our eyes before we give up.
const TRIES: u32 = 5;

/// What `read` makes of the newest batch. A running pipeline may remove files that the batch after it replaces: then that one is
/// read.
pub async fn read<T>(
    checkpoint: &Checkpoint,
    read: impl AsyncFn(&Recovered) -> Result<T, Error>,
) -> Result<(Recovered, T), Error> {
    let mut tries = 1;
    loop {
        let recovered = checkpoint.recover().await?;
        match read(&recovered).await {
            Ok(found) => return Ok((recovered, found)),
            Err(e) => {
                let now = checkpoint.recover().await?.commit.map(|c| c.batch);
                if tries == TRIES || now == recovered.commit.map(|c| c.batch) {
                    return Err(e);
                }
                tries += 1;
            }
        }
    }
}
