//! The time that the governor goes by: the system's, or in tests one that passes only when everybody waits.

use std::time::{Duration, Instant};

/// A clock. Clones show the same.
#[derive(Clone, Debug, Default)]
pub(crate) struct Clock(#[cfg(test)] Option<std::sync::Arc<simulated::Time>>);

impl Clock {
    /// What it shows.
    pub fn now(&self) -> Instant {
        #[cfg(test)]
        if let Some(time) = &self.0 {
            return time.now();
        }
        Instant::now()
    }

    /// Waits.
    pub async fn sleep(&self, time: Duration) {
        #[cfg(test)]
        if let Some(simulated) = &self.0 {
            return simulated.sleep(time).await;
        }
        tokio::time::sleep(time).await;
    }

    /// One that stands still until [`simulated::Time::pass`].
    #[cfg(test)]
    pub fn simulated(time: &std::sync::Arc<simulated::Time>) -> Clock {
        Clock(Some(time.clone()))
    }
}

#[cfg(test)]
pub(crate) mod simulated {
    use std::task::{Poll, Waker};
    use std::time::{Duration, Instant};

    use parking_lot::Mutex;

    /// A time that is told to pass.
    #[derive(Debug)]
    pub struct Time {
        now: Mutex<Instant>,
        sleepers: Mutex<Vec<(Instant, Waker)>>,
    }

    impl Default for Time {
        fn default() -> Time {
            Time { now: Mutex::new(Instant::now()), sleepers: Mutex::default() }
        }
    }

    impl Time {
        pub fn now(&self) -> Instant {
            *self.now.lock()
        }

        pub async fn sleep(&self, time: Duration) {
            // What takes no time at all would never pass.
            let until = self.now() + time.max(Duration::from_micros(1));
            std::future::poll_fn(|context| {
                if self.now() >= until {
                    return Poll::Ready(());
                }
                self.sleepers.lock().push((until, context.waker().clone()));
                Poll::Pending
            })
            .await;
        }

        /// Goes on to when the first of those who sleep is to wake, and wakes who is due. Returns whether anybody sleeps.
        pub fn pass(&self) -> bool {
            let mut sleepers = self.sleepers.lock();
            let Some(first) = sleepers.iter().map(|(until, _)| *until).min() else { return false };
            let mut now = self.now.lock();
            *now = first.max(*now);
            let due: Vec<(Instant, Waker)> = sleepers.extract_if(.., |(until, _)| *until <= *now).collect();
            drop((now, sleepers));
            due.into_iter().for_each(|(_, waker)| waker.wake());
            true
        }
    }
}
