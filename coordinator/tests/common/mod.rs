//! What tests on object stores share.

use object_store::aws::AmazonS3Builder;
use object_store::{BackoffConfig, ObjectStore, RetryConfig};
use std::sync::Arc;
use std::time::Duration;
use tests::s3::{BUCKET, KEY, S3, SECRET};

/// A client of a test's store, which tries again up to three times, and soon.
pub fn client(s3: &S3) -> Arc<dyn ObjectStore> {
    security::use_ring();
    let backoff = BackoffConfig { init_backoff: Duration::from_millis(1), ..BackoffConfig::default() };
    let retry = RetryConfig { backoff, max_retries: 3, ..RetryConfig::default() };
    let builder = AmazonS3Builder::new().with_endpoint(&s3.endpoint).with_allow_http(true).with_retry(retry);
    let builder = builder.with_bucket_name(BUCKET).with_access_key_id(KEY).with_secret_access_key(SECRET);
    Arc::new(builder.build().unwrap())
}
