//! A panic of one request, kept from the others.

use std::future::{Future, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::task::Poll;

/// Something panicked; the program's hook has logged it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Panicked;

/// `future`, ended by a panic inside of it. It is dropped then, with everything it has.
pub(crate) async fn caught<F: Future>(future: F) -> Result<F::Output, Panicked> {
    let mut future = pin!(future);
    poll_fn(move |context| {
        let polled = catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(context)));
        match polled {
            Ok(Poll::Pending) => Poll::Pending,
            Ok(Poll::Ready(output)) => Poll::Ready(Ok(output)),
            Err(_) => Poll::Ready(Err(Panicked)),
        }
    })
    .await
}

/// Work that keeps a thread busy, away from those that serve connections.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Panicked> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|_| Panicked)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_is_an_error() {
        assert_eq!(caught(async { 7 }).await, Ok(7));
        assert_eq!(
            caught(async { panic!("as asked") }).await,
            Err::<(), _>(Panicked)
        );
        let late = async {
            tokio::task::yield_now().await;
            panic!("as asked, later")
        };
        assert_eq!(caught(late).await, Err::<(), _>(Panicked));
        assert_eq!(blocking(|| 7).await, Ok(7));
        assert_eq!(
            blocking(|| panic!("as asked")).await,
            Err::<(), _>(Panicked)
        );
    }
}
