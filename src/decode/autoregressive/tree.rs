//! A tree of candidate tokens: what drafters propose and one forward verifies.
//!
//! Node 0 is the root, the last committed token. Candidates that begin alike share their nodes, so that no prefix is run twice
//! (ReDrafter's dynamic tree attention, Zhang et al., arXiv 2403.09919, is [`Tree::from_beams`]).

/// Candidates behind a root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tree {
    tokens: Vec<u32>,
    /// Of each node; the root's is itself. Parents stand before their children.
    parents: Vec<usize>,
    depths: Vec<usize>,
    /// How good a drafter must have been thought to propose the node: the number of the first beam that goes through it. A draft
    /// of width `w` has just the nodes of rank below `w`.
    ranks: Vec<usize>,
    /// Candidates that share each node; the root's do not count.
    shared: Vec<usize>,
}

impl Tree {
    /// The root alone: nothing is proposed.
    pub fn root(token: u32) -> Self {
        Self { tokens: vec![token], parents: vec![0], depths: vec![0], ranks: vec![0], shared: vec![0] }
    }

    /// Shares the prefixes of `beams`, each the tokens behind the root, best first.
    pub fn from_beams<'a>(root: u32, beams: impl IntoIterator<Item = &'a [u32]>) -> Self {
        let mut tree = Self::root(root);
        for (rank, beam) in beams.into_iter().enumerate() {
            let mut node = 0;
            for token in beam {
                node = tree.propose(node, *token, rank);
            }
        }
        tree
    }

    /// Adds a candidate behind `parent`, which must not have it yet; gives its node. Nobody shares it so far.
    fn push(&mut self, parent: usize, token: u32, rank: usize) -> usize {
        self.tokens.push(token);
        self.parents.push(parent);
        self.depths.push(self.depths[parent] + 1);
        self.ranks.push(rank.max(self.ranks[parent]));
        self.shared.push(0);
        self.tokens.len() - 1
    }

    /// One proposed token behind `parent`: a node of its own, or that of the same token proposed there before.
    pub fn propose(&mut self, parent: usize, token: u32, rank: usize) -> usize {
        let node = self.child(parent, token).unwrap_or_else(|| self.push(parent, token, rank));
        self.shared[node] += 1;
        node
    }

    /// Nodes, the root included.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether nothing is proposed.
    pub fn is_empty(&self) -> bool {
        self.tokens.len() == 1
    }

    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    pub fn parents(&self) -> &[usize] {
        &self.parents
    }

    pub fn depths(&self) -> &[usize] {
        &self.depths
    }

    pub fn ranks(&self) -> &[usize] {
        &self.ranks
    }

    /// Candidate tokens before prefixes were shared; the root does not count.
    pub fn candidates(&self) -> usize {
        self.shared.iter().sum()
    }

    /// Length of the longest candidate.
    pub fn depth(&self) -> usize {
        self.depths.iter().copied().max().unwrap_or(0)
    }

    /// The node behind `parent` with this token.
    pub fn child(&self, parent: usize, token: u32) -> Option<usize> {
        (parent + 1..self.len()).find(|node| self.parents[*node] == parent && self.tokens[*node] == token)
    }

    /// Drops candidates deeper than `depth`, so that none reaches beyond the end of the canvas, and all behind the first `nodes`.
    pub fn cut(&self, depth: usize, nodes: usize) -> Self {
        self.filter(|node| self.depths[node] <= depth && node < nodes)
    }

    /// The first candidate alone.
    pub fn first_path(&self) -> Self {
        let mut path = self.filter(|node| self.ranks[node] == 0);
        path.shared[1..].fill(1);
        path
    }

    /// `keeps` must keep the parent of all that it keeps; the root stays in any case.
    fn filter(&self, keeps: impl Fn(usize) -> bool) -> Self {
        let mut places = vec![0; self.len()];
        let mut tree = Self::root(self.tokens[0]);
        for node in 1..self.len() {
            if keeps(node) {
                places[node] = tree.push(places[self.parents[node]], self.tokens[node], self.ranks[node]);
                tree.shared[places[node]] = self.shared[node];
            }
        }
        tree
    }

    /// Tokens on the way from the root, which is left out, to `node`.
    pub fn path(&self, mut node: usize) -> Vec<u32> {
        let mut path = vec![];
        while node != 0 {
            path.push(self.tokens[node]);
            node = self.parents[node];
        }
        path.reverse();
        path
    }

    /// Follows what the network chose at each node ("sample and descend"): the nodes that were confirmed, the root first. The
    /// token chosen at the last of them is the first that no candidate had. `ends` says after which token nothing follows, and
    /// `length_max` bounds the nodes.
    ///
    /// This is lossless for whatever candidates: each emitted token is the network's own choice given those before it, and the
    /// candidates decide only whether the row that makes the next choice has been computed already.
    pub fn walk(&self, chosen: impl Fn(usize) -> u32, ends: impl Fn(u32) -> bool, length_max: usize) -> Vec<usize> {
        let mut path = vec![0];
        while path.len() < length_max {
            let node = path[path.len() - 1];
            let token = chosen(node);
            match self.child(node, token) {
                Some(child) if !ends(token) => path.push(child),
                _ => break,
            }
        }
        path
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn beams(rows: &[[u32; 4]]) -> Tree {
        Tree::from_beams(rows[0][0], rows.iter().map(|row| &row[1..]))
    }

    #[test]
    fn the_golden_packings() {
        // Apple's `tree_attention.py` on its authors' examples.
        let tree = beams(&[[91, 92, 93, 95], [91, 92, 94, 96], [91, 92, 93, 97]]);
        assert_eq!(tree.tokens(), [91, 92, 93, 95, 94, 96, 97]);
        assert_eq!(tree.depths(), [0, 1, 2, 3, 2, 3, 3]);
        assert_eq!(tree.parents(), [0, 0, 1, 2, 1, 4, 2]);
        assert_eq!(tree.candidates(), 9);
        let tree = beams(&[[93, 94, 95, 92], [93, 95, 96, 93], [93, 94, 97, 96]]);
        assert_eq!(tree.tokens(), [93, 94, 95, 92, 95, 96, 93, 97, 96]);
        assert_eq!(tree.depths(), [0, 1, 2, 3, 1, 2, 3, 2, 3]);
    }

    #[test]
    fn a_wrong_first_candidate_is_not_accepted() {
        let tree = Tree::from_beams(1, [[2, 3].as_slice()]);
        assert_eq!(tree.walk(|node| [9, 3, 4][node], |_| false, 10), [0]);
        assert_eq!(tree.walk(|node| [2, 9, 4][node], |_| false, 10), [0, 1]);
        assert_eq!(tree.walk(|node| [2, 3, 4][node], |_| false, 10), [0, 1, 2]);
        assert_eq!(tree.walk(|node| [2, 3, 4][node], |token| token == 2, 10), [0], "nothing follows an end");
        assert_eq!(tree.walk(|node| [2, 3, 4][node], |_| false, 2), [0, 1]);
    }

    #[test]
    fn cuts_keep_what_is_left_in_order() {
        let tree = beams(&[[91, 92, 93, 95], [91, 92, 94, 96], [91, 92, 93, 97]]);
        assert_eq!((tree.cut(3, 7).candidates(), tree.cut(3, 7)), (9, tree.clone()));
        assert_eq!((tree.cut(2, 7).tokens(), tree.cut(2, 7).candidates()), ([91, 92, 93, 94].as_slice(), 6));
        assert_eq!((tree.cut(3, 5).tokens(), tree.cut(3, 5).candidates()), ([91, 92, 93, 95, 94].as_slice(), 7));
        assert_eq!((tree.first_path().tokens(), tree.first_path().candidates()), ([91, 92, 93, 95].as_slice(), 3));
        assert_eq!(tree.path(5), [92, 94, 96]);
        assert_eq!(tree.ranks(), [0, 0, 0, 0, 1, 1, 2]);
    }
}
