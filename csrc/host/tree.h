// The prefix tree of a paged KV cache: which page and slot hold which token of which branch.
//
// A branch is the cached tokens [0, c) of its path and the tokens after them that are known but not
// cached yet: one between two steps, the pending token, which the next step feeds at position c.
// Nodes hold cached tokens. A branch ends where its node ends, so a node is read whole by every
// branch at or below it; forks and truncations inside a node split it, and a node that is left with
// one child and no branch of its own takes the child in again.
//
// A token at position p lies in slot p mod page_size of its page, whatever node it belongs to. A
// node that begins in the middle of a page gets a fresh page and uses it from there on, or goes on
// in its parent's page where nobody else does: no token is ever copied for a fork. The extents of
// one page lie on one path, so the slots before the first of them are free, and there `block_table`
// copies the path's earlier tokens of that block when somebody asks for plain pages.
//
// No verb changes anything unless it succeeds.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

namespace rlkern::kv {

enum class Status {
  kOk,
  kOutOfPages,
  kUnknownBranch,
  kDuplicate,
  kBadPosition,
  kPinned,
  kSuspended,
  kStale,
  kNotComputed,
};

// What became of a call. `at` is the place in its arguments that is wrong; `needed` pages where
// there were too few.
struct Outcome {
  Status status = Status::kOk;
  int64_t at = -1;
  int64_t needed = 0;

  explicit operator bool() const { return status == Status::kOk; }
};

// What to do with tokens that older weights computed: compute them again, read them, or refuse.
enum class Stale { kRecompute, kKeep, kForbid };

struct Token {
  int32_t id;
  float logprob;
  float entropy;    // of what it was drawn from
  int32_t version;  // of the weights that drew it
};

// Of tokens that a verb brings; empty: zeros.
struct Marks {
  std::span<const float> logprob, entropy;
};

// Tokens to feed: where their keys and values go. A segment is a branch's, or a node's.
struct Work {
  std::vector<int32_t> slots, positions, tokens;
  std::vector<int64_t> offsets{0};
  std::vector<int64_t> branches;  // one whose path holds the segment
};

// The work list of attention over the last cached tokens of branches; see docs/kv.md.
struct Plan {
  std::vector<int32_t> rows;      // the batch in the order of the tree
  std::vector<int32_t> items;     // kItemFields numbers each
  std::vector<int32_t> slots;     // of the items' keys
  std::vector<int32_t> trees{0};  // where each tree's items begin
  std::vector<int32_t> parts;     // of each of `rows` its partial results, in order
  std::vector<int32_t> part_offsets{0};
  int32_t max_rows = 0;
};
enum ItemField { kRowBegin, kRowCount, kSlotBegin, kSlotCount, kChunk, kPartBegin, kItemFields };

// Pages by block of every branch, and the copies that make them whole.
struct BlockTable {
  struct Copy {
    int32_t from, to, begin, end;  // pages, and the slots within them
  };
  std::vector<int32_t> pages;  // [branches, width]; -1 past a branch's end
  std::vector<int32_t> lengths;
  std::vector<Copy> copies;
  int64_t width = 0;
};

// Nodes in DFS pre-order. A branch's uncached tokens are a node of their own, with kv_version -1.
struct Export {
  std::vector<int32_t> parent, start, length, subtree_end;
  std::vector<int64_t> kv_version;
  std::vector<Token> tokens;  // of all nodes, one after another
  std::vector<int64_t> branches;
  std::vector<int32_t> branch_node;  // -1: no tokens
};

struct BranchInfo {
  int64_t cached, known, group, parent;
  bool suspended, pinned;
};

class Tree {
 public:
  Tree(int64_t num_pages, int64_t page_size, Stale stale);

  // One branch for each sequence of tokens, all of them still to be fed.
  std::vector<int64_t> create(std::span<const int32_t> tokens, std::span<const int64_t> offsets,
                              std::span<const int64_t> groups, const Marks& marks);
  // counts[i] children of each branch, of its first at[i] tokens, the last of which is pending; at
  // -1: of all there is, as it is. With `forced`, one token for every child, the children keep
  // at[i] tokens cached and this one is pending.
  Outcome fork(std::span<const int64_t> branches, std::span<const int64_t> counts,
               std::span<const int64_t> at, std::span<const int32_t> forced, const Marks& marks,
               std::vector<int64_t>* children);
  // With `subtree`, also what was forked from them, but for pinned branches.
  Outcome prune(std::span<const int64_t> branches, bool subtree);
  // To the first lengths[i] tokens, the last of which becomes pending.
  Outcome truncate(std::span<const int64_t> branches, std::span<const int64_t> lengths);
  // Branch i goes on from branches[parents[i]]; who has no offspring is pruned.
  Outcome resample(std::span<const int64_t> branches, std::span<const int64_t> parents,
                   std::vector<int64_t>* next);
  Outcome pin(std::span<const int64_t> branches, bool pinned);
  Outcome suspend(std::span<const int64_t> branches, bool drop);
  Outcome resume(std::span<const int64_t> branches);
  // Of the weights that compute from now on.
  Outcome set_version(int32_t version);
  // Tokens after those that each branch has.
  Outcome append(std::span<const int64_t> branches, std::span<const int32_t> tokens,
                 std::span<const int64_t> offsets, const Marks& marks);
  // Slots for the next counts[i] tokens of each branch, which count as cached from now on; -1: all.
  Outcome append_slots(std::span<const int64_t> branches, std::span<const int64_t> counts,
                       Work* work);
  // The nodes of these branches that must be computed again, parents first; they count as computed.
  Outcome recompute(std::span<const int64_t> branches, Work* work);
  // A row of the batch for each of the last counts[i] cached tokens of a branch.
  Outcome plan(std::span<const int64_t> branches, std::span<const int64_t> counts, int64_t chunk,
               bool share, Plan* plan);
  Outcome block_table(std::span<const int64_t> branches, BlockTable* table);
  Export export_group(int64_t group) const;

  Outcome info(int64_t branch, BranchInfo* info) const;
  Outcome tokens(int64_t branch, std::vector<Token>* tokens) const;
  // The slot of every cached token.
  Outcome slots(int64_t branch, std::vector<int32_t>* slots) const;
  std::vector<int64_t> branches() const;
  int64_t page_size() const { return page_size_; }
  int64_t num_pages() const { return static_cast<int64_t>(references_.size()); }
  int64_t free_pages() const { return static_cast<int64_t>(free_pages_.size()); }
  int64_t num_nodes() const { return static_cast<int64_t>(nodes_.size() - free_nodes_.size()); }
  int32_t version() const { return version_; }
  Stale stale() const { return stale_; }
  // Counts everything again: "" when each invariant holds, else what does not.
  std::string check() const;

 private:
  // Tokens from position `begin` up to the next extent, in one page.
  struct Extent {
    int32_t begin, page;
  };
  struct Node {
    int32_t parent = -1, start = 0;
    int32_t version = 0;  // of the weights that computed it; -1: not computed
    bool resident = true;
    bool alive = false;
    std::vector<Token> tokens;
    std::vector<Extent> extents;
    std::vector<int32_t> children, attached;  // nodes; branches that end here

    int32_t end() const { return start + static_cast<int32_t>(tokens.size()); }
  };
  struct Branch {
    int64_t id = -1, group = 0;
    int32_t parent = -1;  // forked from; -1: nobody that lives
    int32_t node = -1;    // -1: nothing is cached
    int32_t place = -1;   // in the node's attached
    int32_t pins = 0;
    bool suspended = false;
    bool dropped = false;    // needs no pages
    std::vector<Token> due;  // known, not cached
    std::vector<int32_t> forks;
  };
  // What a call has done to a node so far, while it is only counted.
  struct Tally {
    int64_t epoch = 0;
    bool grew = false, continued = false;
  };

  // Looks up all branches, which must differ.
  Outcome find(std::span<const int64_t> ids, std::vector<int32_t>* found);
  Outcome find_live(std::span<const int64_t> ids, std::vector<int32_t>* found);
  Outcome find_readable(std::span<const int64_t> ids, std::vector<int32_t>* found);
  int32_t add_branch(int64_t group, int32_t parent);
  void remove_branch(int32_t b);
  bool holds(const Branch& b) const { return !b.dropped || b.pins > 0; }
  int64_t cached(const Branch& b) const { return b.node < 0 ? 0 : nodes_[b.node].end(); }
  std::vector<int32_t> path(int32_t node) const;
  std::vector<Token> all_tokens(const Branch& b) const;
  std::vector<Token> tokens_between(const Branch& b, int64_t begin, int64_t end) const;

  int32_t add_node(int32_t parent, int32_t start);
  void attach(int32_t b, int32_t node);
  void detach(int32_t b);
  int32_t split(int32_t node, int32_t at);
  // The node that ends at `at` on the path to `node`; splits where there is none.
  int32_t ending_at(int32_t node, int32_t at);
  // Frees, drops and merges what is no longer wanted, from `node` to its root.
  void tidy(int32_t node);
  bool merges_with_child(const Node& node) const;
  void merge_child(int32_t node);
  void release(Node& node);

  int32_t take_page(int32_t first_slot);
  void release_page(int32_t page);
  // Extents for the positions from the node's last extent's end, `begin`, to `end`.
  void cover(Node& node, int32_t begin, int32_t end);
  int64_t pages_to_cover(int64_t begin, int64_t end, bool continues) const;
  bool can_continue_page(const Node& node) const;
  bool grows_in_place(const Node& node) const;
  template <class F>
  void for_slots(const Node& node, const F& f) const;

  int64_t page_size_;
  Stale stale_;
  int32_t version_ = 0;
  int64_t next_id_ = 0;
  int64_t epoch_ = 0;
  std::vector<Node> nodes_;
  std::vector<int32_t> free_nodes_;
  std::vector<Branch> branches_;
  std::vector<int32_t> free_branches_;
  std::vector<int64_t> seen_;  // by branch: the last epoch
  std::vector<Tally> tally_;   // by node
  std::unordered_map<int64_t, int32_t> by_id_;
  std::vector<int32_t> references_, first_slot_;  // by page
  std::vector<uint8_t> whole_;                    // by page: the slots before its first are copies
  std::vector<int32_t> free_pages_;
};

}  // namespace rlkern::kv
