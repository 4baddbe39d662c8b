//! A reader of server-sent events that keeps to the standard and to nothing else.

use reqwest::{RequestBuilder, Response, StatusCode};
use serde_json::Value;

use crate::rig::{DEADLINE, Rig};

/// One message of a stream.
#[derive(Clone, Debug, PartialEq)]
pub struct Message {
    pub id: Option<i64>,
    pub event: String,
    pub data: Value,
}

/// An open stream.
pub struct Stream {
    response: Response,
    text: String,
    /// Lines that are comments.
    pub comments: usize,
}

impl Stream {
    /// Opens a stream; `last` is what was seen already.
    pub async fn open(rig: &Rig, path: &str, last: Option<i64>) -> Self {
        let request = rig.service.request(reqwest::Method::GET, &format!("/api/v1{path}"));
        Self::of(match last {
            Some(last) => request.header("last-event-id", last),
            None => request,
        })
        .await
    }

    pub async fn of(request: RequestBuilder) -> Self {
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        Self { response, text: String::new(), comments: 0 }
    }

    /// The next message; nothing at the end of the stream.
    pub async fn next(&mut self) -> Option<Message> {
        loop {
            while let Some((block, rest)) = self.text.split_once("\n\n") {
                let (block, rest) = (block.to_owned(), rest.to_owned());
                self.text = rest;
                if let Some(message) = self.message(&block) {
                    return Some(message);
                }
            }
            let chunk = tokio::time::timeout(DEADLINE, self.response.chunk()).await.expect("nothing comes").unwrap()?;
            self.text.push_str(std::str::from_utf8(&chunk).unwrap());
        }
    }

    /// Waits for a comment where no message comes.
    pub async fn comment(&mut self) {
        let before = self.comments;
        while self.comments == before {
            let chunk = tokio::time::timeout(DEADLINE, self.response.chunk()).await.expect("silence").unwrap();
            self.text.push_str(std::str::from_utf8(&chunk.expect("the stream ended")).unwrap());
            while let Some((block, rest)) = self.text.split_once("\n\n") {
                let (block, rest) = (block.to_owned(), rest.to_owned());
                self.text = rest;
                assert_eq!(self.message(&block), None);
            }
        }
    }

    fn message(&mut self, block: &str) -> Option<Message> {
        let (mut id, mut event, mut data) = (None, None, None);
        for line in block.lines() {
            match line.split_once(':').unwrap_or_else(|| panic!("{line:?} in {block:?}")) {
                ("", _) => self.comments += 1,
                ("id", value) => id = Some(value.trim().parse().unwrap()),
                ("event", value) => event = Some(value.trim().to_owned()),
                ("data", value) => assert!(data.replace(serde_json::from_str(value).unwrap()).is_none(), "{block}"),
                _ => panic!("{line:?} in {block:?}"),
            }
        }
        Some(Message { id, event: event?, data: data? })
    }

    /// The next message for which this holds; those before it are handed to `others`.
    pub async fn until(&mut self, holds: impl Fn(&Message) -> bool, others: &mut Vec<Message>) -> Message {
        loop {
            let message = self.next().await.expect("the stream ended");
            if holds(&message) {
                return message;
            }
            others.push(message);
        }
    }

    /// Everything until the end of the stream.
    pub async fn rest(mut self) -> Vec<Message> {
        let mut messages = Vec::new();
        while let Some(message) = self.next().await {
            messages.push(message);
        }
        messages
    }
}

/// The numbers of the stored ones.
pub fn ids(messages: &[Message]) -> Vec<i64> {
    messages.iter().filter_map(|message| message.id).collect()
}
