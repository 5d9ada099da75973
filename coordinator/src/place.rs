//! Where metrics and checkpoints lie: a directory, or an object store that all coordinators of a fleet reach.
//!
//! What a store needs to be spoken to comes from the environment, as its own tools have it, and never from the command
//! line: `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_REGION`, `AWS_ENDPOINT_URL`, `AWS_ALLOW_HTTP`, …;
//! `GOOGLE_APPLICATION_CREDENTIALS`, …; or the role of the machine. Behind the feature `object-stores`.

use crate::error::said;
use crate::trouble::{Storage, Trouble};
use bytes::Bytes;
use object_store::path::Path as ObjectPath;
use object_store::prefix::PrefixStore;
use object_store::{Error, ObjectStore, ObjectStoreExt, PutMode};
use std::fmt::{Display, Formatter};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// What a place is looked at with.
const PROBE: &[u8] = b"LoraFleet looks whether it can write here";

/// The first element of a probe's name.
const PROBES: &str = "probe";

/// How long a store is waited for when somebody asks how it is.
const ANSWER: Duration = Duration::from_secs(3);

/// Where metrics and checkpoints lie.
#[derive(Debug, Clone)]
pub enum Place {
    /// In `history/` and `artifacts/` of a directory.
    Directory(PathBuf),
    /// In an object store.
    Objects(Objects),
}

/// An object store that every coordinator of a fleet reaches. Clones share it.
#[derive(Debug, Clone)]
pub struct Objects {
    store: Arc<dyn ObjectStore>,
    url: String,
    /// What is written again and again to see whether that works.
    probe: ObjectPath,
}

/// Why a place cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// It is named in no form that is known.
    #[error(
        "`{0}` is no place: name a directory, file:///DIRECTORY, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX"
    )]
    Form(String),
    /// This program cannot speak to stores.
    #[error("`{0}`: this program was built without the feature `object-stores`")]
    Feature(String),
    /// The settings of the environment do not do.
    #[error("`{url}`: {}; see the variables {variables} of this process", said(error))]
    Settings {
        /// The place.
        url: String,
        /// What is wrong with them.
        error: Box<Error>,
        /// Which they are.
        variables: &'static str,
    },
    /// The store refused a probe.
    #[error("`{url}`: {what} failed: {}; {remedy}", said(error))]
    Refused {
        /// The place.
        url: String,
        /// What was tried.
        what: &'static str,
        /// What the store said.
        error: Box<Error>,
        /// What to do.
        remedy: &'static str,
    },
    /// The store replaces objects although it was told not to.
    #[error(
        "`{0}`: it replaces an object that was to be created only (If-None-Match), so that two leaders could overwrite \
         each other's; use a store that keeps to that"
    )]
    Replaces(String),
    /// Other bytes came back.
    #[error(
        "`{0}`: it gives back other bytes than were written; see what stands between this machine and the store"
    )]
    Other(String),
}

impl PlaceError {
    /// Whether the arguments or the store's settings are wrong, and not merely its state of the moment.
    pub fn is_settled(&self) -> bool {
        !matches!(self, Self::Refused { error, .. } if matches!(**error, Error::Generic { .. }))
    }
}

impl Place {
    /// Reads what `--artifacts` says. Nothing is asked of a store yet.
    ///
    /// # Errors
    /// It is of no known form, or the environment has no usable settings for it.
    pub fn parse(text: &str) -> Result<Self, PlaceError> {
        let form = || PlaceError::Form(text.into());
        match text.split_once("://") {
            None if text.is_empty() => Err(form()),
            None => Ok(Self::Directory(text.into())),
            Some(("file", path)) if path.starts_with('/') => Ok(Self::Directory(path.into())),
            Some((scheme @ ("s3" | "gs"), rest)) => {
                let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
                let named = bucket.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
                let prefix = ObjectPath::parse(prefix).map_err(|_| form())?;
                if bucket.is_empty() || !named {
                    return Err(form());
                }
                let store = connected(scheme, bucket, text)?;
                Ok(Self::Objects(Objects::on(Arc::new(PrefixStore::new(store, prefix)), text)))
            }
            Some(_) => Err(form()),
        }
    }

    /// [`Trouble::look`], and the same for a store: what cannot be written there now, for people.
    pub async fn look(&self, trouble: &Trouble) -> Option<String> {
        match self {
            Self::Directory(dir) => {
                let (trouble, dir) = (trouble.clone(), dir.clone());
                tokio::task::spawn_blocking(move || trouble.look(&dir)).await.unwrap_or_default()
            }
            Self::Objects(objects) => {
                match tokio::time::timeout(ANSWER, objects.touch()).await {
                    Ok(Ok(())) => trouble.succeeded(Storage::Disk),
                    Ok(Err(error)) => trouble.failed(Storage::Disk, error),
                    Err(_) => {
                        let seconds = ANSWER.as_secs();
                        trouble
                            .failed(Storage::Disk, format!("{}: no answer within {seconds} s", objects.url));
                    }
                }
                trouble.now()
            }
        }
    }
}

impl Display for Place {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Directory(dir) => dir.display().fmt(f),
            Self::Objects(objects) => f.write_str(&objects.url),
        }
    }
}

impl Objects {
    /// Any store whose writes are durable when they return, whose listings are what was written, and that creates only
    /// what is not there; `url` is what people call it.
    pub fn on(store: Arc<dyn ObjectStore>, url: impl Into<String>) -> Self {
        Self { store, url: url.into(), probe: probe_name() }
    }

    /// The store, below the prefix.
    pub fn store(&self) -> Arc<dyn ObjectStore> {
        self.store.clone()
    }

    /// Writes a small object, sees that it is not replaced, reads it, finds it in a listing, and deletes it.
    ///
    /// # Errors
    /// The store refuses one of these, or does not do it.
    pub async fn probe(&self) -> Result<(), PlaceError> {
        let object = &probe_name();
        let create = || self.store.put_opts(object, PROBE.into(), PutMode::Create.into());
        create().await.map_err(self.refused("writing"))?;
        let again = create().await;
        let read = async {
            let found = self.store.get(object).await?;
            found.bytes().await
        };
        let read = read.await;
        let listed = self.store.list_with_delimiter(Some(&ObjectPath::from(PROBES))).await;
        // Whatever came of the rest, it is not left there if that can be.
        self.store.delete(object).await.map_err(self.refused("deleting"))?;
        match again {
            Ok(_) => return Err(PlaceError::Replaces(self.url.clone())),
            Err(Error::AlreadyExists { .. }) => {}
            Err(error) => return Err(self.refused("writing again")(error)),
        }
        if read.map_err(self.refused("reading"))? != Bytes::from_static(PROBE) {
            return Err(PlaceError::Other(self.url.clone()));
        }
        let listed = listed.map_err(self.refused("listing"))?;
        match listed.objects.iter().any(|found| found.location == *object) {
            true => Ok(()),
            false => Err(PlaceError::Other(self.url.clone())),
        }
    }

    /// Writes a small object and deletes it.
    async fn touch(&self) -> Result<(), PlaceError> {
        self.store.put(&self.probe, PROBE.into()).await.map_err(self.refused("writing"))?;
        self.store.delete(&self.probe).await.map_err(self.refused("deleting"))
    }

    fn refused(&self, what: &'static str) -> impl FnOnce(Error) -> PlaceError {
        let url = self.url.clone();
        move |error| {
            let remedy = match &error {
                Error::NotFound { .. } => "make the bucket, or correct its name or AWS_ENDPOINT_URL",
                Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => {
                    "see that these credentials are right and may get, put, delete and list there"
                }
                Error::NotImplemented { .. } => "unset AWS_CONDITIONAL_PUT: objects must be created only",
                _ => {
                    "see that the store can be reached (AWS_ENDPOINT_URL, AWS_REGION) and that there are credentials \
                     (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS, or a role of this \
                     machine)"
                }
            };
            PlaceError::Refused { url, what, error: error.into(), remedy }
        }
    }
}

fn probe_name() -> ObjectPath {
    ObjectPath::from_iter([PROBES, &uuid::Uuid::new_v4().to_string()])
}

#[cfg(not(feature = "object-stores"))]
fn connected(_: &str, _: &str, url: &str) -> Result<Arc<dyn ObjectStore>, PlaceError> {
    Err(PlaceError::Feature(url.into()))
}

/// The bucket, by the settings of the environment.
#[cfg(feature = "object-stores")]
fn connected(scheme: &str, bucket: &str, url: &str) -> Result<Arc<dyn ObjectStore>, PlaceError> {
    use object_store::aws::AmazonS3Builder;
    use object_store::gcp::GoogleCloudStorageBuilder;
    use object_store::{BackoffConfig, RetryConfig};

    // Whoever writes tries again by themselves, and says so; what is behind them waits only so long.
    let retry = RetryConfig {
        backoff: BackoffConfig { max_backoff: Duration::from_secs(2), ..BackoffConfig::default() },
        max_retries: 4,
        retry_timeout: Duration::from_secs(10),
    };
    security::use_ring();
    let (store, variables): (object_store::Result<Arc<dyn ObjectStore>>, _) = match scheme {
        "gs" => {
            let store = GoogleCloudStorageBuilder::from_env().with_bucket_name(bucket).with_retry(retry);
            (store.build().map(|store| Arc::new(store) as _), "GOOGLE_…")
        }
        _ => {
            let store = AmazonS3Builder::from_env().with_bucket_name(bucket).with_retry(retry);
            (store.build().map(|store| Arc::new(store) as _), "AWS_…")
        }
    };
    store.map_err(|error| PlaceError::Settings { url: url.into(), error: error.into(), variables })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_of_places() {
        let directory = |text: &str| match Place::parse(text) {
            Ok(Place::Directory(dir)) => Some(dir.display().to_string()),
            _ => None,
        };
        for (text, expected) in [
            ("/mnt/lorafleet", Some("/mnt/lorafleet")),
            ("relative/dir", Some("relative/dir")),
            ("file:///mnt/lorafleet", Some("/mnt/lorafleet")),
            ("file://host/dir", None),
        ] {
            assert_eq!(directory(text).as_deref(), expected, "{text}");
        }
        for text in [
            "",
            "s3://",
            "s3:///prefix",
            "s3://user:word@bucket",
            "s3://b/a//x",
            "gs://",
            "http://bucket",
            "az://x",
        ] {
            assert!(matches!(Place::parse(text), Err(PlaceError::Form(_))), "{text}");
        }
    }

    #[cfg(feature = "object-stores")]
    #[test]
    fn stores_are_called_as_they_were_named() {
        for text in ["s3://bucket", "s3://bucket/a/b", "gs://bucket_1/a"] {
            // Without credentials, whose lack shows with the first request.
            let place = Place::parse(text).unwrap();
            assert!(matches!(place, Place::Objects(_)), "{text}");
            assert_eq!(place.to_string(), text);
        }
    }

    #[tokio::test]
    async fn a_probe_leaves_nothing() {
        let store = Arc::new(object_store::memory::InMemory::new());
        Objects::on(store.clone(), "memory").probe().await.unwrap();
        assert!(store.list_with_delimiter(None).await.unwrap().common_prefixes.is_empty());
    }
}
