//! Answers that are old: a coordinator that lost etcd's majority tells what it last knew, and says so in a header.

use crate::output::say;
use proto::STALE_SECONDS;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use tonic::codegen::Service;
use tonic::codegen::http::{Request, Response};

/// A connection over which the first answer that is old has a person told.
#[derive(Debug, Clone)]
pub(crate) struct Warned<S> {
    inner: S,
    said: Arc<AtomicBool>,
}

impl<S> Warned<S> {
    /// Clones say it once together.
    pub(crate) fn new(inner: S) -> Self {
        Self { inner, said: Arc::default() }
    }
}

impl<S, A, B> Service<Request<A>> for Warned<S>
where
    S: Service<Request<A>, Response = Response<B>>,
    S::Future: Send + 'static,
{
    type Response = Response<B>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<B>, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<A>) -> Self::Future {
        let (answer, said) = (self.inner.call(request), Arc::clone(&self.said));
        Box::pin(async move {
            let answer = answer.await?;
            if let Some(seconds) = answer.headers().get(STALE_SECONDS)
                && !said.swap(true, Ordering::Relaxed)
            {
                let seconds = seconds.to_str().unwrap_or("some");
                say!(
                    "this answer is {seconds} s old: etcd has no majority, or the coordinator does not reach it"
                );
            }
            Ok(answer)
        })
    }
}
