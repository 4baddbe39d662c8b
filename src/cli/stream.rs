//! Server-sent events as they come in pieces: bytes in, messages out. Pure.

use super::client::ClientError;

/// The longest line that is taken; an event has some hundred bytes.
const LINE_MAX: usize = 1 << 20;

/// One message.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Message {
    /// What a reader says when it comes again.
    pub(super) id: Option<String>,
    /// Its kind; `message` where none was sent.
    pub(super) event: String,
    /// Its lines.
    pub(super) data: String,
}

/// What has come of the next message.
#[derive(Debug, Default)]
pub(super) struct Messages {
    line: Vec<u8>,
    message: Message,
    has_data: bool,
}

impl Messages {
    /// Takes what came, and gives back what it completed.
    ///
    /// # Errors
    /// A line without end: something else answers there.
    pub(super) fn take(&mut self, bytes: &[u8], url: &str) -> Result<Vec<Message>, ClientError> {
        let mut messages = Vec::new();
        for byte in bytes {
            if *byte != b'\n' {
                if self.line.len() >= LINE_MAX {
                    return Err(ClientError::Malformed { url: url.to_owned() });
                }
                self.line.push(*byte);
                continue;
            }
            let line = String::from_utf8_lossy(&std::mem::take(&mut self.line)).into_owned();
            messages.extend(self.line(line.trim_end_matches('\r')));
        }
        Ok(messages)
    }

    fn line(&mut self, line: &str) -> Option<Message> {
        if line.is_empty() {
            let mut message = std::mem::take(&mut self.message);
            if message.event.is_empty() {
                message.event.push_str("message");
            }
            return std::mem::take(&mut self.has_data).then_some(message);
        }
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "id" => self.message.id = Some(value.to_owned()),
            "event" => value.clone_into(&mut self.message.event),
            "data" => {
                if std::mem::replace(&mut self.has_data, true) {
                    self.message.data.push('\n');
                }
                self.message.data.push_str(value);
            }
            // Comments, and what this version does not know.
            _ => {}
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = ": a comment\n\nid: 7\nevent: job.state\ndata: {\"a\":1}\n\nretry: 5\ndata:x\r\ndata: y\r\n\r\nid: 9\ndata: cut";

    #[test]
    fn messages_come_out_whole_however_they_came_in() {
        for piece in 1..TEXT.len() {
            let mut messages = Messages::default();
            let mut found = Vec::new();
            for bytes in TEXT.as_bytes().chunks(piece) {
                found.extend(messages.take(bytes, "").unwrap());
            }
            assert_eq!(found.len(), 2, "in pieces of {piece}");
            assert_eq!(
                (found[0].id.as_deref(), found[0].event.as_str(), found[0].data.as_str()),
                (Some("7"), "job.state", "{\"a\":1}")
            );
            assert_eq!(
                (found[1].id.as_deref(), found[1].event.as_str(), found[1].data.as_str()),
                (None, "message", "x\ny")
            );
        }
    }

    #[test]
    fn a_line_without_end_is_refused() {
        assert!(Messages::default().take(&vec![b'x'; LINE_MAX + 1], "").is_err());
    }
}
