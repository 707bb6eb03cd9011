//! The Tokenization service: a model's tokenizer by itself.

use std::sync::Arc;

use tonic::{Request, Response, Status};

use super::access::Access;
use super::proto::{self, DetokenizeRequest, DetokenizeResponse, Token, TokenizeRequest, TokenizeResponse};
use super::registry::Registry;
use super::status;
use crate::engine::request::PROMPT_BYTES_MAX;

pub struct Tokenization {
    registry: Arc<Registry>,
}

impl Tokenization {
    pub fn new(registry: Arc<Registry>) -> Self {
        Self { registry }
    }
}

#[tonic::async_trait]
impl proto::tokenization_server::Tokenization for Tokenization {
    async fn tokenize(&self, request: Request<TokenizeRequest>) -> Result<Response<TokenizeResponse>, Status> {
        let access = Access::of(request.extensions());
        let request = request.into_inner();
        let info = self.registry.find(&request.model)?.info;
        access.model(&info.name)?;
        let tokenizer = info.tokenizer.clone();
        if request.text.len() > PROMPT_BYTES_MAX {
            let reason = format!("{} bytes are more than {PROMPT_BYTES_MAX}", request.text.len());
            return Err(status::bad_field("text", reason));
        }
        let tokens = self.registry.off_thread(move || {
            let ids = tokenizer.encode(&request.text, request.add_special_tokens.unwrap_or(false))?;
            let token = |id| Token { token_id: id, text: tokenizer.token_text(id) };
            Ok::<_, String>(ids.into_iter().map(token).collect())
        });
        let tokens = tokens.await?.map_err(|reason| status::bad_field("text", reason))?;
        Ok(Response::new(TokenizeResponse { tokens }))
    }

    async fn detokenize(&self, request: Request<DetokenizeRequest>) -> Result<Response<DetokenizeResponse>, Status> {
        let access = Access::of(request.extensions());
        let request = request.into_inner();
        let info = self.registry.find(&request.model)?.info;
        access.model(&info.name)?;
        // The tokenizer would silently leave such a token out.
        if let Some(id) = request.token_ids.iter().find(|id| **id as usize >= info.config.vocab_size) {
            let reason = format!("token id {id} is outside the vocabulary of {}", info.config.vocab_size);
            return Err(status::bad_field("token_ids", reason));
        }
        let text = self
            .registry
            .off_thread(move || info.tokenizer.decode(&request.token_ids, request.keep_special_tokens.unwrap_or(false)));
        let text = text.await?.map_err(|reason| status::bad_field("token_ids", reason))?;
        Ok(Response::new(DetokenizeResponse { text }))
    }
}
