//! Keys and values of beginnings that have been seen before, in blocks of tokens: a system prompt is computed once.
//!
//! A tree of blocks, each reached by its tokens from the block before it, so that what is found is exactly what was asked for. Where no
//! block has all of the next tokens, the first ones of the block that has most of them will do. A sequence copies what it finds and
//! goes on from there. Under pressure the block goes that was used longest ago; one that others stand on does not go before them. The
//! store knows nothing of sequences or requests.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::model::ModelError;
use crate::model::cache::KvCache;
use crate::tensor::Tensor;

/// Tokens of a block, or a few more: the end of a text that does not fill one is not kept.
const BLOCK: usize = 16;

type Node = u64;
/// Before the first token.
const ROOT: Node = 0;

struct Block {
    parent: Node,
    tokens: Box<[u32]>,
    /// `[layers, 2, kv_heads, block, head_dim]`.
    data: Tensor,
    used: u64,
    children: usize,
}

/// The store.
pub struct Prefixes {
    /// Tokens of a block.
    block: usize,
    /// What is used of it is a multiple of this.
    align: usize,
    /// Tokens that it may hold.
    room: usize,
    blocks: HashMap<Node, Block>,
    /// A block by the one before it and its tokens; in order, so that those that begin alike are neighbours.
    children: BTreeMap<(Node, Box<[u32]>), Node>,
    /// Blocks that no other stands on, the one used longest ago first.
    leaves: BTreeSet<(u64, Node)>,
    next: Node,
    clock: u64,
}

impl Prefixes {
    /// Room for so many tokens. Blocks are aligned to `align` tokens: where attention goes by blocks, the model's own.
    pub fn new(room: usize, align: usize) -> Self {
        let align = align.max(1);
        let block = BLOCK.next_multiple_of(align);
        let (blocks, children, leaves) = (HashMap::new(), BTreeMap::new(), BTreeSet::new());
        Self { block, align, room, blocks, children, leaves, next: ROOT + 1, clock: 0 }
    }

    /// Tokens held.
    pub fn tokens(&self) -> usize {
        self.blocks.len() * self.block
    }

    /// Fills the empty `cache` with what is known of the beginning of `tokens`; gives how many of them that is. The last token is
    /// always left to compute, since something has to say what follows it.
    pub fn load(&mut self, tokens: &[u32], cache: &mut KvCache) -> Result<usize, ModelError> {
        self.clock += 1;
        let asked = &tokens[..tokens.len().saturating_sub(1)];
        let (mut node, mut loaded) = (ROOT, 0);
        while let Some((child, alike)) = self.closest(node, &asked[loaded..]) {
            let Some(block) = self.blocks.get(&child) else { break };
            cache.append(&block.data, alike)?;
            self.touch(child);
            (node, loaded) = (child, loaded + alike);
            if alike < self.block {
                break;
            }
        }
        Ok(loaded)
    }

    /// The block behind `node` that begins with most of `tokens`, and with how many.
    fn closest(&self, node: Node, tokens: &[u32]) -> Option<(Node, usize)> {
        let tokens = &tokens[..tokens.len().min(self.block)];
        let key = (node, Box::from(tokens));
        // In order, nothing is more like it than what would stand next to it.
        let neighbours = [self.children.range(&key..).next(), self.children.range(..&key).next_back()];
        let siblings = neighbours.into_iter().flatten().filter(|((parent, _), _)| *parent == node);
        let alike = |known: &[u32]| known.iter().zip(tokens).take_while(|(known, token)| known == token).count();
        let found = siblings.map(|((_, known), child)| (*child, alike(known) / self.align * self.align));
        found.max_by_key(|(_, alike)| *alike).filter(|(_, alike)| *alike > 0)
    }

    /// Keeps what `cache` holds of `tokens`, in whole blocks, where `room` is left for so many tokens in all.
    pub fn store(&mut self, tokens: &[u32], cache: &KvCache, room: usize) -> Result<(), ModelError> {
        self.clock += 1;
        let whole = tokens.len().min(cache.len()) / self.block;
        let mut node = ROOT;
        for (index, tokens) in tokens.chunks_exact(self.block).take(whole).enumerate() {
            let key = (node, Box::from(tokens));
            if let Some(child) = self.children.get(&key) {
                node = *child;
                self.touch(node);
                continue;
            }
            if self.tokens() + self.block > self.room.min(room) && !self.evict() {
                return Ok(());
            }
            let data = cache.slice(index * self.block, self.block)?;
            let child = self.next;
            self.next += 1;
            let block = Block { parent: node, tokens: key.1.clone(), data, used: self.clock, children: 0 };
            self.blocks.insert(child, block);
            self.children.insert(key, child);
            self.leaves.insert((self.clock, child));
            if let Some(parent) = self.blocks.get_mut(&node) {
                parent.children += 1;
                self.leaves.remove(&(parent.used, node));
            }
            node = child;
        }
        Ok(())
    }

    /// Gives up blocks until at most so many tokens are held.
    pub fn shrink(&mut self, tokens: usize) {
        // The clock moves on, so that nothing counts as in use.
        self.clock += 1;
        while self.tokens() > tokens && self.evict() {}
    }

    fn touch(&mut self, node: Node) {
        if let Some(block) = self.blocks.get_mut(&node) {
            if self.leaves.remove(&(block.used, node)) {
                self.leaves.insert((self.clock, node));
            }
            block.used = self.clock;
        }
    }

    /// Drops the block used longest ago among those that no other stands on; never one of the chain being stored now.
    fn evict(&mut self) -> bool {
        let Some((_, node)) = self.leaves.first().copied().filter(|(used, _)| *used < self.clock) else { return false };
        self.leaves.pop_first();
        let Some(block) = self.blocks.remove(&node) else { return false };
        self.children.remove(&(block.parent, block.tokens));
        if let Some(parent) = self.blocks.get_mut(&block.parent) {
            parent.children -= 1;
            if parent.children == 0 {
                self.leaves.insert((parent.used, block.parent));
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;
    use crate::checkpoint::config::ModelConfig;
    use crate::tensor::{Kind, Placement};

    /// As if nobody else needed any.
    const ROOM: usize = usize::MAX;

    fn config() -> ModelConfig {
        let json = serde_json::json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 8, "vocab_size": 100, "max_position_embeddings": 256,
        });
        ModelConfig::from_json(&json).unwrap()
    }

    fn empty() -> KvCache {
        KvCache::new(&config(), Placement::CPU_F32, 1024).unwrap()
    }

    /// A cache that holds, for each token, numbers that depend on it and all before it.
    fn cache(tokens: &[u32]) -> KvCache {
        let mut cache = empty();
        let mut sum = 0.0;
        for token in tokens {
            sum = sum * 0.5 + f64::from(*token);
            let one = Tensor::full([2, 2, 2, 1, 4], sum, (Kind::Float, tch::Device::Cpu));
            cache.append(&one, 1).unwrap();
        }
        cache
    }

    fn text(length: u32, salt: u32) -> Vec<u32> {
        (0..length).map(|at| (at * 7 + salt * (at + 1) + 3) % 100).collect()
    }

    /// Loads, checks that what came is right, and gives how much it was.
    fn load(store: &mut Prefixes, tokens: &[u32]) -> usize {
        let mut found = empty();
        let loaded = store.load(tokens, &mut found).unwrap();
        assert_eq!(found.len(), loaded);
        if loaded > 0 {
            assert_eq!(found.kept().unwrap(), cache(&tokens[..loaded]).kept().unwrap());
        }
        loaded
    }

    #[test]
    fn what_two_texts_share_is_found() {
        let mut store = Prefixes::new(1000, 1);
        let (a, mut b) = (text(70, 0), text(70, 0));
        b[40] += 1;
        assert_eq!(load(&mut store, &a), 0);
        store.store(&a, &cache(&a), ROOM).unwrap();
        assert_eq!(store.tokens(), 64);
        assert_eq!((load(&mut store, &a), load(&mut store, &b), load(&mut store, &text(70, 1))), (64, 40, 0));
        assert_eq!(load(&mut store, &a[..64]), 63, "the last token is left to compute");
        store.store(&b, &cache(&b), ROOM).unwrap();
        assert_eq!(store.tokens(), 96, "two blocks are shared");
        assert_eq!((load(&mut store, &a), load(&mut store, &b)), (64, 64));
        // The same tokens behind others are something else.
        assert_eq!(load(&mut store, &[&b[16..32], &a[..40]].concat()), 0);
    }

    /// Texts of few different tokens share beginnings of all lengths.
    #[test]
    fn nothing_that_is_held_begins_more_alike() {
        let alike = |a: &[u32], b: &[u32]| a.iter().zip(b).take_while(|(a, b)| a == b).count();
        for (seed, align) in [(0, 1), (1, 1), (2, 4), (3, 6), (4, 32)] {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let (mut store, mut held) = (Prefixes::new(100_000, align), vec![vec![]]);
            let mut found = 0;
            for _ in 0..60 {
                let known: &Vec<u32> = &held[rng.random_range(0..held.len())];
                let mut tokens = known[..rng.random_range(0..=known.len())].to_vec();
                tokens.extend((0..rng.random_range(1..50)).map(|_| rng.random_range(0..2)));
                let most = held.iter().map(|held| alike(held, &tokens[..tokens.len() - 1])).max().unwrap();
                assert_eq!(load(&mut store, &tokens), most / align * align, "seed {seed}, blocks of {align}");
                found += usize::from(!(most / align * align).is_multiple_of(store.block));
                store.store(&tokens, &cache(&tokens), ROOM).unwrap();
                held.push(tokens[..tokens.len() / store.block * store.block].to_vec());
            }
            assert_eq!(found > 10, align < store.block, "parts of blocks were found {found} times");
        }
    }

    /// Under pressure, and with some of them used again: what may go is what nothing stands on, in the order of its last use.
    #[test]
    fn what_goes_first_is_always_known() {
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        let (mut store, mut held) = (Prefixes::new(320, 1), vec![vec![]]);
        for turn in 0..300 {
            let known: &Vec<u32> = &held[rng.random_range(0..held.len())];
            let mut tokens = known[..rng.random_range(0..=known.len().min(100))].to_vec();
            tokens.extend((0..rng.random_range(1..40)).map(|_| rng.random_range(0..2)));
            load(&mut store, &tokens);
            let room = if turn % 7 == 0 { 160 } else { ROOM };
            let before = store.tokens();
            store.store(&tokens, &cache(&tokens), room).unwrap();
            assert!(store.tokens() <= before.max(room.min(320)), "it grows within its room and what others leave");
            if turn % 50 == 49 {
                store.shrink(64);
                assert!(store.tokens() <= 64);
            }
            held.push(tokens);
            let standing = |node: &Node| store.blocks.values().filter(|block| block.parent == *node).count();
            assert!(store.blocks.iter().all(|(node, block)| block.children == standing(node)));
            let free = store.blocks.iter().filter(|(_, block)| block.children == 0);
            assert_eq!(store.leaves, free.map(|(node, block)| (block.used, *node)).collect());
            assert_eq!(store.children.len(), store.blocks.len());
        }
    }

    #[test]
    fn a_cache_that_holds_less_than_the_text_gives_what_it_has() {
        let mut store = Prefixes::new(1000, 1);
        let tokens = text(70, 0);
        store.store(&tokens, &cache(&tokens[..40]), ROOM).unwrap();
        assert_eq!((store.tokens(), load(&mut store, &tokens)), (32, 32));
    }

    #[test]
    fn blocks_keep_the_models_alignment() {
        for (align, block) in [(1, 16), (4, 16), (6, 18), (32, 32)] {
            let mut store = Prefixes::new(1000, align);
            store.store(&text(100, 0), &cache(&text(100, 0)), ROOM).unwrap();
            assert_eq!(store.tokens(), 100 / block * block, "{align}");
        }
    }

    #[test]
    fn the_longest_unused_goes_first_and_never_before_what_stands_on_it() {
        let mut store = Prefixes::new(96, 1);
        let texts: Vec<Vec<u32>> = (0..3).map(|salt| text(33, salt)).collect();
        for tokens in &texts {
            store.store(tokens, &cache(tokens), ROOM).unwrap();
        }
        assert_eq!((store.tokens(), load(&mut store, &texts[0])), (96, 32));
        let new = text(50, 9);
        store.store(&new, &cache(&new), ROOM).unwrap();
        assert_eq!(store.tokens(), 96);
        assert_eq!((load(&mut store, &new), load(&mut store, &texts[0])), (48, 32), "what was just used stays");
        assert_eq!((load(&mut store, &texts[1]), load(&mut store, &texts[2])), (0, 16));
        store.shrink(40);
        assert_eq!(store.tokens(), 32);
        store.shrink(0);
        assert_eq!((store.tokens(), store.children.len()), (0, 0));
        // One text that is longer than the room keeps its beginning.
        let long = text(120, 0);
        store.store(&long, &cache(&long), ROOM).unwrap();
        assert_eq!((store.tokens(), load(&mut store, &long)), (96, 96));
        let mut none = Prefixes::new(0, 1);
        none.store(&long, &cache(&long), ROOM).unwrap();
        assert_eq!(none.tokens(), 0);
    }
}
