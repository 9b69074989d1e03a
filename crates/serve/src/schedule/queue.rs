//! The queue: first come, first served within a client, and clients take turns.

use std::collections::VecDeque;

use super::job::Client;

/// Waiting work of several clients.
#[derive(Debug)]
pub(crate) struct FairQueue<T> {
    /// Clients that wait, the next one first; none has an empty queue.
    clients: VecDeque<(Client, VecDeque<T>)>,
    len: usize,
}

impl<T> Default for FairQueue<T> {
    fn default() -> Self {
        Self {
            clients: VecDeque::new(),
            len: 0,
        }
    }
}

impl<T> FairQueue<T> {
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Work of `client` that waits.
    pub(crate) fn len_of(&self, client: Client) -> usize {
        let queue = self.clients.iter().find(|(known, _)| *known == client);
        queue.map_or(0, |(_, queue)| queue.len())
    }

    /// Clients that wait.
    pub(crate) fn n_clients(&self) -> usize {
        self.clients.len()
    }

    pub(crate) fn push(&mut self, client: Client, work: T) {
        self.len += 1;
        match self.clients.iter_mut().find(|(known, _)| *known == client) {
            Some((_, queue)) => queue.push_back(work),
            None => self.clients.push_back((client, VecDeque::from([work]))),
        }
    }

    /// The oldest work of the client whose turn it is.
    pub(crate) fn pop(&mut self) -> Option<T> {
        let (client, mut queue) = self.clients.pop_front()?;
        let work = queue.pop_front();
        self.len -= usize::from(work.is_some());
        if !queue.is_empty() {
            self.clients.push_back((client, queue));
        }
        work
    }

    /// Forgets the work that `keep` does not want.
    pub(crate) fn retain(&mut self, mut keep: impl FnMut(&T) -> bool) {
        for (_, queue) in &mut self.clients {
            queue.retain(&mut keep);
        }
        self.clients.retain(|(_, queue)| !queue.is_empty());
        self.len = self.clients.iter().map(|(_, queue)| queue.len()).sum();
    }

    /// Takes everything.
    pub(crate) fn drain(&mut self) -> Vec<T> {
        self.len = 0;
        let clients = std::mem::take(&mut self.clients);
        clients.into_iter().flat_map(|(_, queue)| queue).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_take_turns() {
        let [a, b, c] = [0, 1, 2].map(Client::Key);
        let mut queue = FairQueue::default();
        for (client, work) in [(a, 1), (a, 2), (a, 3), (b, 4), (c, 5), (b, 6)] {
            queue.push(client, work);
        }
        assert_eq!((queue.len(), queue.len_of(a), queue.n_clients()), (6, 3, 3));
        let order: Vec<i32> = std::iter::from_fn(|| queue.pop()).collect();
        assert_eq!(order, [1, 4, 5, 2, 6, 3]);
        assert_eq!((queue.len(), queue.n_clients()), (0, 0));
    }

    #[test]
    fn work_is_forgotten_and_counted() {
        let mut queue = FairQueue::default();
        for work in 0..6 {
            queue.push(Client::Key(work % 2), work);
        }
        queue.retain(|work| work % 2 == 1 && *work > 1);
        assert_eq!((queue.len(), queue.n_clients()), (2, 1));
        assert_eq!(queue.pop(), Some(3));
        assert_eq!(queue.drain(), [5]);
        assert_eq!(queue.len(), 0);
        assert_eq!(queue.pop(), None);
    }
}
