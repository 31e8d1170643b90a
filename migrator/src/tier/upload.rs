//! How a pack gets into the bucket: in parts, one at a time on a slow link, for as long as parts get through.
//!
//! It hides what S3 calls a multipart upload. Invariants: there is no bound on the whole, but one on each part, so that an
//! upload ends that gets nowhere, and none that is merely slow; one that fails or is cancelled is aborted, since parts that
//! were left behind would be in no listing, and on the bill.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Duration;

use layerfs::Error;
use object_store::aws::AmazonS3;
use object_store::path::Path;
use object_store::{MultipartUpload, ObjectStoreExt, PutPayload};
use tokio::fs::File;
use tokio::io::AsyncReadExt;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use super::PATIENCE;
use crate::governor::{Gate, Way};

/// The smallest part that S3 takes: what is lost with a part that fails is the least, and so is what a slow link must
/// get through in time.
pub const PART_BYTES: usize = 5 << 20;
/// So many parts are under way at a time while the link is quick.
const PARTS: usize = 2;

/// How long parts may take.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// One that takes longer has failed: a link that does less than 4 KiB a second is as good as none.
    pub part: Duration,
    /// While one takes no longer, two go at a time.
    pub quick: Duration,
}

impl Default for Pace {
    fn default() -> Pace {
        Pace { part: Duration::from_secs(1200), quick: Duration::from_secs(4) }
    }
}

/// What an upload tells.
#[derive(Debug)]
pub enum Step {
    /// So many bytes more have got through.
    Sent(u64),
    /// It has ended, and nothing is left of it if it failed.
    Ended(Result<(), Fault>),
}

/// Why an upload failed.
#[derive(Debug)]
pub enum Fault {
    /// It was asked to.
    Cancelled,
    /// A request took longer than this.
    Late(Duration),
    /// The file can't be read.
    File(Error),
    /// The bucket, or the way there.
    Bucket(object_store::Error),
}

/// One file on its way.
#[derive(Debug)]
pub struct Upload {
    /// A client that doesn't end requests by itself.
    pub store: Arc<AmazonS3>,
    pub to: Path,
    pub from: PathBuf,
    pub gate: Gate,
    pub pace: Pace,
    /// Ends it.
    pub cancel: CancellationToken,
}

impl Upload {
    /// Uploads it, and tells what got through.
    pub async fn run(&self, tell: &Sender<Step>) -> Result<(), Fault> {
        let failed = |e| Fault::File(Error::file("read", &self.from, e));
        let mut file = File::open(&self.from).await.map_err(failed)?;
        let bytes = file.metadata().await.map_err(failed)?.len();
        if bytes > PART_BYTES as u64 {
            return self.in_parts(&mut file, tell).await;
        }
        let whole = async {
            let all = PutPayload::from(self.part(&mut file).await?);
            within(self.pace.part, self.store.put(&self.to, all)).await
        };
        self.unless_cancelled(whole).await?;
        let _ = tell.send(Step::Sent(bytes));
        Ok(())
    }

    async fn in_parts(&self, file: &mut File, tell: &Sender<Step>) -> Result<(), Fault> {
        let mut upload = within(PATIENCE, self.store.put_multipart(&self.to)).await?;
        let mut flying = JoinSet::new();
        let parts = self.unless_cancelled(self.parts(&mut *upload, &mut flying, file, tell)).await;
        // What is still on its way must not arrive after the end.
        flying.shutdown().await;
        let done = match parts {
            Ok(()) => within(PATIENCE, upload.complete()).await.map(drop),
            Err(fault) => Err(fault),
        };
        if done.is_err()
            && let Err(fault) = within(PATIENCE, upload.abort()).await
        {
            let detail = match fault {
                Fault::Bucket(error) => super::said(&error),
                _ => "no answer in time".to_owned(),
            };
            tracing::warn!(to = %self.to, "parts of a failed upload stay in the bucket, where no listing shows them: {detail}");
        }
        done
    }

    async fn parts(
        &self,
        upload: &mut dyn MultipartUpload,
        flying: &mut JoinSet<Result<(u64, Duration), Fault>>,
        file: &mut File,
        tell: &Sender<Step>,
    ) -> Result<(), Fault> {
        // The first goes alone: how long it takes tells what the link is like.
        let mut most = 1;
        loop {
            let part = self.part(file).await?;
            let (bytes, is_end) = (part.len() as u64, part.is_empty());
            while !flying.is_empty() && (is_end || flying.len() >= most) {
                let Some(landed) = flying.join_next().await else { break };
                let (sent, took) = landed.map_err(|error| Fault::Bucket(error.into()))??;
                let _ = tell.send(Step::Sent(sent));
                most = if took <= self.pace.quick { PARTS } else { 1 };
            }
            if is_end {
                return Ok(());
            }
            let (put, limit) = (upload.put_part(part.into()), self.pace.part);
            flying.spawn(async move {
                let began = Instant::now();
                within(limit, put).await.map(|()| (bytes, began.elapsed()))
            });
        }
    }

    /// The next part of the file, once the limit lets it out; empty at the end.
    async fn part(&self, file: &mut File) -> Result<Vec<u8>, Fault> {
        let mut part = Vec::new();
        let read = file.take(PART_BYTES as u64).read_to_end(&mut part).await;
        let mut left = read.map_err(|e| Fault::File(Error::file("read", &self.from, e)))?;
        // In small pieces, so that others who may go first can go between them.
        while left > 0 {
            let piece = left.min(self.gate.piece_bytes(Way::Out));
            drop(self.gate.ready(Way::Out, piece).await);
            left -= piece;
        }
        Ok(part)
    }

    async fn unless_cancelled<T>(&self, work: impl Future<Output = Result<T, Fault>>) -> Result<T, Fault> {
        tokio::select! {
            done = work => done,
            () = self.cancel.cancelled() => Err(Fault::Cancelled),
        }
    }
}

async fn within<T>(limit: Duration, work: impl Future<Output = object_store::Result<T>>) -> Result<T, Fault> {
    timeout(limit, work).await.map_err(|_| Fault::Late(limit))?.map_err(Fault::Bucket)
}
