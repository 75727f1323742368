#include "tree.h"

#include <algorithm>
#include <numeric>

namespace rlkern::kv {
namespace {

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

Outcome fail(Status status, int64_t at) { return {status, at, 0}; }

Token marked(int32_t id, const Marks& marks, int64_t i, int32_t version) {
  const auto at = [i](std::span<const float> values) { return values.empty() ? 0.0f : values[i]; };
  return {id, at(marks.logprob), at(marks.entropy), version};
}

void erase_value(std::vector<int32_t>& list, int32_t value) {
  list.erase(std::find(list.begin(), list.end(), value));
}

}  // namespace

Tree::Tree(int64_t num_pages, int64_t page_size, Stale stale)
    : page_size_(page_size), stale_(stale) {
  references_.assign(num_pages, 0);
  first_slot_.assign(num_pages, 0);
  whole_.assign(num_pages, 0);
  free_pages_.resize(num_pages);
  // the lowest page is taken first
  std::iota(free_pages_.rbegin(), free_pages_.rend(), 0);
}

// Pages.

int32_t Tree::take_page(int32_t first_slot) {
  const int32_t page = free_pages_.back();
  free_pages_.pop_back();
  references_[page] = 1;
  first_slot_[page] = first_slot;
  whole_[page] = first_slot == 0;
  return page;
}

void Tree::release_page(int32_t page) {
  if (--references_[page] == 0) free_pages_.push_back(page);
}

int64_t Tree::pages_to_cover(int64_t begin, int64_t end, bool continues) const {
  if (begin >= end) return 0;
  return divide_up(end, page_size_) -
         (continues ? divide_up(begin, page_size_) : begin / page_size_);
}

void Tree::cover(Node& node, int32_t begin, int32_t end) {
  const int32_t size = static_cast<int32_t>(page_size_);
  int32_t at = begin;
  if (at % size != 0 && !node.extents.empty()) at = std::min(end, (at / size + 1) * size);
  for (; at < end; at = (at / size + 1) * size) node.extents.push_back({at, take_page(at % size)});
}

bool Tree::can_continue_page(const Node& node) const {
  if (!node.resident || node.end() % page_size_ == 0) return false;
  const int32_t page = node.extents.back().page;
  return std::none_of(node.children.begin(), node.children.end(), [&](int32_t c) {
    return !nodes_[c].extents.empty() && nodes_[c].extents.front().page == page;
  });
}

template <class F>
void Tree::for_slots(const Node& node, const F& f) const {
  for (size_t i = 0; i < node.extents.size(); ++i) {
    const Extent& extent = node.extents[i];
    const int32_t end = i + 1 < node.extents.size() ? node.extents[i + 1].begin : node.end();
    const int64_t base = extent.page * page_size_;
    for (int32_t p = extent.begin; p < end; ++p) f(p, static_cast<int32_t>(base + p % page_size_));
  }
}

// Nodes.

int32_t Tree::add_node(int32_t parent, int32_t start) {
  int32_t index;
  if (free_nodes_.empty()) {
    index = static_cast<int32_t>(nodes_.size());
    nodes_.emplace_back();
    tally_.emplace_back();
  } else {
    index = free_nodes_.back();
    free_nodes_.pop_back();
    nodes_[index] = Node{};
  }
  Node& node = nodes_[index];
  node.alive = true;
  node.parent = parent;
  node.start = start;
  node.version = version_;
  if (parent >= 0) nodes_[parent].children.push_back(index);
  return index;
}

void Tree::attach(int32_t b, int32_t node) {
  branches_[b].node = node;
  if (node < 0) return;
  branches_[b].place = static_cast<int32_t>(nodes_[node].attached.size());
  nodes_[node].attached.push_back(b);
}

void Tree::detach(int32_t b) {
  Branch& branch = branches_[b];
  if (branch.node < 0) return;
  std::vector<int32_t>& attached = nodes_[branch.node].attached;
  attached[branch.place] = attached.back();
  branches_[attached.back()].place = branch.place;
  attached.pop_back();
  branch.node = branch.place = -1;
}

// The upper part is new: branches and children stay where they are.
int32_t Tree::split(int32_t index, int32_t at) {
  const int32_t upper_index = add_node(-1, nodes_[index].start);
  Node& lower = nodes_[index];
  Node& upper = nodes_[upper_index];
  upper.parent = lower.parent;
  upper.version = lower.version;
  upper.resident = lower.resident;
  upper.children = {index};
  if (upper.parent >= 0) {
    std::vector<int32_t>& siblings = nodes_[upper.parent].children;
    *std::find(siblings.begin(), siblings.end(), index) = upper_index;
  }
  const auto token = lower.tokens.begin() + (at - lower.start);
  upper.tokens.assign(lower.tokens.begin(), token);
  lower.tokens.erase(lower.tokens.begin(), token);
  auto extent = std::find_if(lower.extents.begin(), lower.extents.end(),
                             [&](const Extent& e) { return e.begin >= at; });
  upper.extents.assign(lower.extents.begin(), extent);
  const bool shared =
      !upper.extents.empty() && (extent == lower.extents.end() ? true : extent->begin > at);
  lower.extents.erase(lower.extents.begin(), extent);
  if (shared) {
    const int32_t page = upper.extents.back().page;
    lower.extents.insert(lower.extents.begin(), {at, page});
    ++references_[page];
  }
  lower.start = at;
  lower.parent = upper_index;
  return upper_index;
}

int32_t Tree::ending_at(int32_t node, int32_t at) {
  while (node >= 0 && nodes_[node].start >= at) node = nodes_[node].parent;
  if (node < 0 || nodes_[node].end() == at) return node;
  return split(node, at);
}

void Tree::release(Node& node) {
  for (const Extent& extent : node.extents) release_page(extent.page);
  node.extents.clear();
}

bool Tree::merges_with_child(const Node& node) const {
  if (!node.attached.empty() || node.children.size() != 1) return false;
  const Node& child = nodes_[node.children[0]];
  return child.version == node.version && child.resident == node.resident;
}

void Tree::merge_child(int32_t index) {
  Node& node = nodes_[index];
  const int32_t child_index = node.children[0];
  Node& child = nodes_[child_index];
  auto first = child.extents.begin();
  if (!node.extents.empty() && first != child.extents.end() &&
      node.extents.back().page == first->page)
    release_page((first++)->page);
  node.extents.insert(node.extents.end(), first, child.extents.end());
  node.tokens.insert(node.tokens.end(), child.tokens.begin(), child.tokens.end());
  node.children = std::move(child.children);
  for (const int32_t c : node.children) nodes_[c].parent = index;
  node.attached = std::move(child.attached);
  for (const int32_t b : node.attached) branches_[b].node = index;
  child = Node{};
  free_nodes_.push_back(child_index);
}

void Tree::tidy(int32_t index) {
  while (index >= 0) {
    Node& node = nodes_[index];
    const int32_t parent = node.parent;
    if (node.attached.empty() && node.children.empty()) {
      if (parent >= 0) erase_value(nodes_[parent].children, index);
      release(node);
      node = Node{};
      free_nodes_.push_back(index);
    } else {
      const auto held = [&](int32_t b) { return holds(branches_[b]); };
      const auto resident = [&](int32_t c) { return nodes_[c].resident; };
      if (node.resident && std::none_of(node.attached.begin(), node.attached.end(), held) &&
          std::none_of(node.children.begin(), node.children.end(), resident)) {
        release(node);
        node.resident = false;
        node.version = -1;
      }
      if (merges_with_child(node)) merge_child(index);
    }
    index = parent;
  }
}

// Branches.

Outcome Tree::find(std::span<const int64_t> ids, std::vector<int32_t>* found) {
  ++epoch_;
  found->resize(ids.size());
  for (size_t i = 0; i < ids.size(); ++i) {
    const auto entry = by_id_.find(ids[i]);
    if (entry == by_id_.end()) return fail(Status::kUnknownBranch, i);
    if (seen_[entry->second] == epoch_) return fail(Status::kDuplicate, i);
    seen_[entry->second] = epoch_;
    (*found)[i] = entry->second;
  }
  return {};
}

Outcome Tree::find_live(std::span<const int64_t> ids, std::vector<int32_t>* found) {
  if (const Outcome outcome = find(ids, found); !outcome) return outcome;
  for (size_t i = 0; i < ids.size(); ++i)
    if (branches_[(*found)[i]].suspended) return fail(Status::kSuspended, i);
  return {};
}

Outcome Tree::find_readable(std::span<const int64_t> ids, std::vector<int32_t>* found) {
  if (const Outcome outcome = find_live(ids, found); !outcome) return outcome;
  for (size_t i = 0; i < ids.size(); ++i)
    for (int32_t n = branches_[(*found)[i]].node; n >= 0; n = nodes_[n].parent) {
      if (nodes_[n].version < 0) return fail(Status::kNotComputed, i);
      if (stale_ != Stale::kKeep && nodes_[n].version != version_) return fail(Status::kStale, i);
    }
  return {};
}

int32_t Tree::add_branch(int64_t group, int32_t parent) {
  int32_t b;
  if (free_branches_.empty()) {
    b = static_cast<int32_t>(branches_.size());
    branches_.emplace_back();
    seen_.push_back(0);
  } else {
    b = free_branches_.back();
    free_branches_.pop_back();
    branches_[b] = Branch{};
  }
  branches_[b].id = next_id_++;
  branches_[b].group = group;
  branches_[b].parent = parent;
  if (parent >= 0) branches_[parent].forks.push_back(b);
  by_id_[branches_[b].id] = b;
  return b;
}

void Tree::remove_branch(int32_t b) {
  const int32_t node = branches_[b].node;
  detach(b);
  tidy(node);
  Branch& branch = branches_[b];
  for (const int32_t f : branch.forks) branches_[f].parent = branch.parent;
  if (branch.parent >= 0) {
    std::vector<int32_t>& forks = branches_[branch.parent].forks;
    erase_value(forks, b);
    forks.insert(forks.end(), branch.forks.begin(), branch.forks.end());
  }
  by_id_.erase(branch.id);
  branch = Branch{};
  free_branches_.push_back(b);
}

std::vector<int32_t> Tree::path(int32_t node) const {
  std::vector<int32_t> nodes;
  for (; node >= 0; node = nodes_[node].parent) nodes.push_back(node);
  std::reverse(nodes.begin(), nodes.end());
  return nodes;
}

std::vector<Token> Tree::all_tokens(const Branch& b) const {
  std::vector<Token> all;
  for (const int32_t n : path(b.node))
    all.insert(all.end(), nodes_[n].tokens.begin(), nodes_[n].tokens.end());
  all.insert(all.end(), b.due.begin(), b.due.end());
  return all;
}

// The tokens [begin, end) of a branch.
std::vector<Token> Tree::tokens_between(const Branch& b, int64_t begin, int64_t end) const {
  std::vector<Token> found(std::max<int64_t>(0, end - begin));
  for (int64_t p = std::max(begin, cached(b)); p < end; ++p)
    found[p - begin] = b.due[p - cached(b)];
  for (int32_t n = b.node; n >= 0 && nodes_[n].end() > begin; n = nodes_[n].parent) {
    const Node& node = nodes_[n];
    for (int64_t p = std::max<int64_t>(begin, node.start); p < std::min<int64_t>(end, node.end());
         ++p)
      found[p - begin] = node.tokens[p - node.start];
  }
  return found;
}

// Verbs.

std::vector<int64_t> Tree::create(std::span<const int32_t> tokens, std::span<const int64_t> offsets,
                                  std::span<const int64_t> groups, const Marks& marks) {
  std::vector<int64_t> ids;
  for (size_t i = 0; i < groups.size(); ++i) {
    Branch& branch = branches_[add_branch(groups[i], -1)];
    for (int64_t t = offsets[i]; t < offsets[i + 1]; ++t)
      branch.due.push_back(marked(tokens[t], marks, t, version_));
    ids.push_back(branch.id);
  }
  return ids;
}

Outcome Tree::fork(std::span<const int64_t> ids, std::span<const int64_t> counts,
                   std::span<const int64_t> at, std::span<const int32_t> forced, const Marks& marks,
                   std::vector<int64_t>* children) {
  std::vector<int32_t> found;
  if (const Outcome outcome = find_live(ids, &found); !outcome) return outcome;
  const bool is_forced = !forced.empty();
  for (size_t i = 0; i < ids.size(); ++i) {
    const Branch& branch = branches_[found[i]];
    const int64_t known = cached(branch) + static_cast<int64_t>(branch.due.size());
    const bool fits = at[i] == -1 || (at[i] >= (is_forced ? 0 : 1) && at[i] <= known);
    if (!fits || counts[i] < 0) return fail(Status::kBadPosition, i);
  }
  int64_t child = 0;
  for (size_t i = 0; i < ids.size(); ++i) {
    if (counts[i] == 0) continue;
    const int32_t parent = found[i];
    const int64_t have = cached(branches_[parent]);
    const int64_t end =
        at[i] >= 0 ? at[i] : have + static_cast<int64_t>(branches_[parent].due.size());
    const int64_t keep = std::min(have, end - (at[i] >= 0 && !is_forced));
    const std::vector<Token> due = tokens_between(branches_[parent], keep, end);
    const int32_t node =
        keep == 0 ? -1 : ending_at(branches_[parent].node, static_cast<int32_t>(keep));
    for (int64_t j = 0; j < counts[i]; ++j, ++child) {
      const int32_t b = add_branch(branches_[parent].group, parent);
      branches_[b].due = due;
      if (is_forced) branches_[b].due.push_back(marked(forced[child], marks, child, version_));
      attach(b, node);
      children->push_back(branches_[b].id);
    }
  }
  return {};
}

Outcome Tree::prune(std::span<const int64_t> ids, bool subtree) {
  std::vector<int32_t> found;
  if (const Outcome outcome = find(ids, &found); !outcome) return outcome;
  for (size_t i = 0; i < ids.size(); ++i)
    if (branches_[found[i]].pins > 0) return fail(Status::kPinned, i);
  // grows while it is walked
  for (size_t i = 0; subtree && i < found.size(); ++i)
    for (const int32_t f : branches_[found[i]].forks)
      if (seen_[f] != epoch_) {
        seen_[f] = epoch_;
        found.push_back(f);
      }
  for (const int32_t b : found)
    if (branches_[b].pins == 0) remove_branch(b);
  return {};
}

Outcome Tree::truncate(std::span<const int64_t> ids, std::span<const int64_t> lengths) {
  std::vector<int32_t> found;
  if (const Outcome outcome = find_live(ids, &found); !outcome) return outcome;
  for (size_t i = 0; i < ids.size(); ++i) {
    const Branch& branch = branches_[found[i]];
    if (branch.pins > 0) return fail(Status::kPinned, i);
    const int64_t known = cached(branch) + static_cast<int64_t>(branch.due.size());
    if (lengths[i] < 1 || lengths[i] > known) return fail(Status::kBadPosition, i);
  }
  for (size_t i = 0; i < ids.size(); ++i) {
    const int32_t b = found[i];
    const int64_t have = cached(branches_[b]), keep = std::min(have, lengths[i] - 1);
    branches_[b].due = tokens_between(branches_[b], keep, lengths[i]);
    if (keep == have) continue;
    const int32_t before = branches_[b].node;
    const int32_t node = keep == 0 ? -1 : ending_at(before, static_cast<int32_t>(keep));
    detach(b);
    attach(b, node);
    tidy(before);
  }
  return {};
}

Outcome Tree::resample(std::span<const int64_t> ids, std::span<const int64_t> parents,
                       std::vector<int64_t>* next) {
  std::vector<int32_t> found;
  if (const Outcome outcome = find_live(ids, &found); !outcome) return outcome;
  const int64_t count = static_cast<int64_t>(ids.size());
  for (int64_t i = 0; i < count; ++i)
    if (parents[i] < 0 || parents[i] >= count) return fail(Status::kBadPosition, i);
  std::vector<bool> continued(count);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t p = parents[i];
    if (!continued[p]) {
      continued[p] = true;
      next->push_back(ids[p]);
      continue;
    }
    const int32_t b = add_branch(branches_[found[p]].group, found[p]);
    branches_[b].due = branches_[found[p]].due;
    attach(b, branches_[found[p]].node);
    next->push_back(branches_[b].id);
  }
  for (int64_t i = 0; i < count; ++i)
    if (!continued[i] && branches_[found[i]].pins == 0) remove_branch(found[i]);
  return {};
}

Outcome Tree::pin(std::span<const int64_t> ids, bool pinned) {
  std::vector<int32_t> found;
  const Outcome outcome = pinned ? find_live(ids, &found) : find(ids, &found);
  if (!outcome) return outcome;
  for (size_t i = 0; i < ids.size(); ++i)
    if (!pinned && branches_[found[i]].pins == 0) return fail(Status::kPinned, i);
  for (const int32_t b : found) {
    branches_[b].pins += pinned ? 1 : -1;
    if (!pinned) tidy(branches_[b].node);
  }
  return {};
}

Outcome Tree::suspend(std::span<const int64_t> ids, bool drop) {
  std::vector<int32_t> found;
  if (const Outcome outcome = find_live(ids, &found); !outcome) return outcome;
  for (const int32_t b : found) {
    branches_[b].suspended = true;
    branches_[b].dropped = drop;
    tidy(branches_[b].node);
  }
  return {};
}

Outcome Tree::resume(std::span<const int64_t> ids) {
  std::vector<int32_t> found;
  if (const Outcome outcome = find(ids, &found); !outcome) return outcome;
  std::vector<int32_t> missing;
  int64_t needed = 0;
  for (const int32_t b : found)
    for (int32_t n = branches_[b].node; n >= 0 && !nodes_[n].resident; n = nodes_[n].parent) {
      if (tally_[n].epoch == epoch_) break;
      tally_[n] = {epoch_};
      missing.push_back(n);
      needed += pages_to_cover(nodes_[n].start, nodes_[n].end(), false);
    }
  if (needed > free_pages()) return {Status::kOutOfPages, -1, needed};
  for (const int32_t n : missing) {
    nodes_[n].resident = true;
    cover(nodes_[n], nodes_[n].start, nodes_[n].end());
  }
  for (const int32_t b : found) branches_[b].suspended = branches_[b].dropped = false;
  for (const int32_t b : found) tidy(branches_[b].node);
  return {};
}

Outcome Tree::set_version(int32_t version) {
  if (version < version_) return fail(Status::kBadPosition, 0);
  version_ = version;
  return {};
}

Outcome Tree::append(std::span<const int64_t> ids, std::span<const int32_t> tokens,
                     std::span<const int64_t> offsets, const Marks& marks) {
  std::vector<int32_t> found;
  if (const Outcome outcome = find_live(ids, &found); !outcome) return outcome;
  for (size_t i = 0; i < ids.size(); ++i)
    for (int64_t t = offsets[i]; t < offsets[i + 1]; ++t)
      branches_[found[i]].due.push_back(marked(tokens[t], marks, t, version_));
  return {};
}

bool Tree::grows_in_place(const Node& node) const {
  return node.attached.size() == 1 && node.children.empty() && node.version == version_;
}

Outcome Tree::append_slots(std::span<const int64_t> ids, std::span<const int64_t> counts,
                           Work* work) {
  std::vector<int32_t> found;
  if (const Outcome outcome = find_readable(ids, &found); !outcome) return outcome;
  int64_t needed = 0;
  std::vector<int64_t> count(ids.size());
  for (size_t i = 0; i < ids.size(); ++i) {
    const Branch& branch = branches_[found[i]];
    const int64_t due = static_cast<int64_t>(branch.due.size());
    count[i] = counts[i] == -1 ? due : counts[i];
    if (count[i] < 0 || count[i] > due) return fail(Status::kBadPosition, i);
    if (count[i] == 0) continue;
    const int64_t begin = cached(branch);
    if (branch.node < 0) {
      needed += pages_to_cover(0, count[i], false);
      continue;
    }
    const Node& node = nodes_[branch.node];
    Tally& tally = tally_[branch.node];
    if (tally.epoch != epoch_) tally = {epoch_};
    bool continues = true;
    if (tally.grew || !grows_in_place(node)) {
      continues = !tally.continued && can_continue_page(node);
      tally.continued |= continues;
      tally.grew = true;
    }
    needed += pages_to_cover(begin, begin + count[i], continues);
  }
  if (needed > free_pages()) return {Status::kOutOfPages, -1, needed};
  for (size_t i = 0; i < ids.size(); ++i) {
    const int32_t b = found[i];
    const int32_t begin = static_cast<int32_t>(cached(branches_[b]));
    const int32_t end = begin + static_cast<int32_t>(count[i]);
    if (end > begin) {
      const int32_t above = branches_[b].node;
      if (above < 0 || !grows_in_place(nodes_[above])) {
        const bool continues = above >= 0 && can_continue_page(nodes_[above]);
        const int32_t index = add_node(above, begin);
        if (continues) {
          const int32_t page = nodes_[above].extents.back().page;
          nodes_[index].extents.push_back({begin, page});
          ++references_[page];
        }
        detach(b);
        attach(b, index);
      }
      Node& node = nodes_[branches_[b].node];
      std::vector<Token>& due = branches_[b].due;
      cover(node, begin, end);
      node.tokens.insert(node.tokens.end(), due.begin(), due.begin() + count[i]);
      size_t extent = node.extents.size() - 1;
      while (node.extents[extent].begin > begin) --extent;
      for (int32_t p = begin; p < end; ++p) {
        if (extent + 1 < node.extents.size() && node.extents[extent + 1].begin == p) ++extent;
        work->slots.push_back(
            static_cast<int32_t>(node.extents[extent].page * page_size_ + p % page_size_));
        work->positions.push_back(p);
        work->tokens.push_back(due[p - begin].id);
      }
      due.erase(due.begin(), due.begin() + count[i]);
    }
    work->offsets.push_back(static_cast<int64_t>(work->slots.size()));
    work->branches.push_back(ids[i]);
  }
  return {};
}

Outcome Tree::recompute(std::span<const int64_t> ids, Work* work) {
  std::vector<int32_t> found;
  if (const Outcome outcome = find_live(ids, &found); !outcome) return outcome;
  if (stale_ == Stale::kForbid)
    for (size_t i = 0; i < ids.size(); ++i)
      for (int32_t n = branches_[found[i]].node; n >= 0; n = nodes_[n].parent)
        if (nodes_[n].version >= 0 && nodes_[n].version != version_) return fail(Status::kStale, i);
  for (size_t i = 0; i < ids.size(); ++i)
    for (const int32_t n : path(branches_[found[i]].node)) {
      Node& node = nodes_[n];
      const bool old = stale_ == Stale::kRecompute && node.version != version_;
      if (node.version >= 0 && !old) continue;
      node.version = version_;
      for_slots(node, [&](int32_t position, int32_t slot) {
        work->slots.push_back(slot);
        work->positions.push_back(position);
        work->tokens.push_back(node.tokens[position - node.start].id);
      });
      work->offsets.push_back(static_cast<int64_t>(work->slots.size()));
      work->branches.push_back(ids[i]);
    }
  // the copies that block_table made are of the old values
  for (size_t p = 0; p < whole_.size(); ++p) whole_[p] = first_slot_[p] == 0;
  for (const int32_t b : found) tidy(branches_[b].node);
  return {};
}

Outcome Tree::plan(std::span<const int64_t> ids, std::span<const int64_t> counts, int64_t chunk,
                   bool share, Plan* plan) {
  std::vector<int32_t> found;
  if (const Outcome outcome = find_readable(ids, &found); !outcome) return outcome;
  // a row of the batch is the path of `end` tokens to a token of a node
  struct Row {
    int32_t node, end;
  };
  std::vector<Row> batch;
  for (size_t i = 0; i < ids.size(); ++i) {
    const Branch& b = branches_[found[i]];
    const int64_t tokens = cached(b);
    if (counts[i] < 0 || counts[i] > std::max<int64_t>(tokens, 1))
      return {Status::kBadPosition, static_cast<int64_t>(i)};
    if (counts[i] == 1 && tokens == 0) batch.push_back({-1, 0});
    if (tokens == 0) continue;
    const size_t first = batch.size();
    int32_t node = b.node;
    for (int64_t end = tokens; end > tokens - counts[i]; --end) {
      while (nodes_[node].start >= end) node = nodes_[node].parent;
      batch.push_back({node, static_cast<int32_t>(end)});
    }
    std::reverse(batch.begin() + first, batch.end());
  }
  const int64_t num_rows = static_cast<int64_t>(batch.size());
  std::vector<int32_t> path_slots;
  int32_t num_parts = 0;
  const auto emit = [&](int64_t k, int64_t end, int64_t row, int64_t rows) {
    const auto begin = path_slots.begin() + k * chunk;
    const int32_t at = static_cast<int32_t>(plan->slots.size());
    plan->slots.insert(plan->slots.end(), begin, path_slots.begin() + end);
    const int32_t fields[kItemFields] = {static_cast<int32_t>(row),
                                         static_cast<int32_t>(rows),
                                         at,
                                         static_cast<int32_t>(end - k * chunk),
                                         static_cast<int32_t>(k),
                                         num_parts};
    plan->items.insert(plan->items.end(), fields, fields + kItemFields);
    num_parts += static_cast<int32_t>(rows);
    plan->max_rows = std::max(plan->max_rows, static_cast<int32_t>(rows));
  };
  const auto add_slots = [&](const Node& node) {
    path_slots.resize(node.start);
    for_slots(node, [&](int32_t, int32_t slot) { path_slots.push_back(slot); });
  };
  const auto end_tree = [&] {
    plan->trees.push_back(static_cast<int32_t>(plan->items.size() / kItemFields));
  };
  if (!share) {
    for (int64_t i = 0; i < num_rows; ++i) {
      path_slots.clear();
      for (const int32_t n : path(batch[i].node)) add_slots(nodes_[n]);
      for (int64_t k = 0; k * chunk < batch[i].end; ++k)
        emit(k, std::min<int64_t>(batch[i].end, (k + 1) * chunk), i, 1);
      plan->rows.push_back(static_cast<int32_t>(i));
      end_tree();
    }
  } else {
    // of each node on a path: rows of the batch that end in it (a list), and at or below it
    std::vector<int32_t> head(nodes_.size(), -1), below(nodes_.size(), 0), next(num_rows, -1);
    std::vector<int32_t> roots, here;
    for (int64_t i = num_rows - 1; i >= 0; --i) {
      const int32_t node = batch[i].node;
      if (node < 0) continue;
      next[i] = head[node];
      head[node] = static_cast<int32_t>(i);
    }
    // rows of one node are neighbours, and climb as one
    for (int64_t i = 0, last; i < num_rows; i = last) {
      for (last = i + 1; last < num_rows && batch[last].node == batch[i].node;) ++last;
      for (int32_t n = batch[i].node; n >= 0; n = nodes_[n].parent) {
        if (below[n] == 0 && nodes_[n].parent < 0) roots.push_back(n);
        below[n] += static_cast<int32_t>(last - i);
      }
    }
    std::vector<int32_t> stack;
    for (const int32_t root : roots) {
      stack.push_back(root);
      while (!stack.empty()) {
        const int32_t index = stack.back();
        const Node& node = nodes_[index];
        stack.pop_back();
        add_slots(node);
        // the shorter paths first: who reads a chunk is a run that ends with all below
        here.clear();
        for (int32_t i = head[index]; i >= 0; i = next[i]) here.push_back(i);
        const auto shorter = [&](int32_t a, int32_t b) { return batch[a].end < batch[b].end; };
        if (!std::is_sorted(here.begin(), here.end(), shorter))
          std::stable_sort(here.begin(), here.end(), shorter);
        const int64_t row = static_cast<int64_t>(plan->rows.size());
        const int64_t ending = static_cast<int64_t>(here.size());
        plan->rows.insert(plan->rows.end(), here.begin(), here.end());
        int64_t skipped = 0;
        for (int64_t k = node.start / chunk; (k + 1) * chunk <= node.end(); ++k) {
          while (skipped < ending && batch[here[skipped]].end < (k + 1) * chunk) ++skipped;
          emit(k, (k + 1) * chunk, row + skipped, below[index] - skipped);
        }
        for (int64_t i = 0, last; i < ending; i = last) {
          const int64_t end = batch[here[i]].end;
          for (last = i + 1; last < ending && batch[here[last]].end == end;) ++last;
          if (end % chunk != 0) emit(end / chunk, end, row + i, last - i);
        }
        for (auto c = node.children.rbegin(); c != node.children.rend(); ++c)
          if (below[*c] > 0) stack.push_back(*c);
      }
      end_tree();
    }
    for (int64_t i = 0; i < num_rows; ++i)
      if (batch[i].node < 0) plan->rows.push_back(static_cast<int32_t>(i));
  }
  // items come in the order of every path: each row's parts are in order, too
  const size_t items = plan->items.size() / kItemFields;
  plan->part_offsets.assign(num_rows + 1, 0);
  for (size_t i = 0; i < items; ++i) {
    const int32_t* item = &plan->items[i * kItemFields];
    for (int32_t r = 0; r < item[kRowCount]; ++r) ++plan->part_offsets[item[kRowBegin] + r + 1];
  }
  std::partial_sum(plan->part_offsets.begin(), plan->part_offsets.end(),
                   plan->part_offsets.begin());
  std::vector<int32_t> at(plan->part_offsets.begin(), plan->part_offsets.end() - 1);
  plan->parts.resize(num_parts);
  for (size_t i = 0; i < items; ++i) {
    const int32_t* item = &plan->items[i * kItemFields];
    for (int32_t r = 0; r < item[kRowCount]; ++r)
      plan->parts[at[item[kRowBegin] + r]++] = item[kPartBegin] + r;
  }
  return {};
}

Outcome Tree::block_table(std::span<const int64_t> ids, BlockTable* table) {
  std::vector<int32_t> found;
  if (const Outcome outcome = find_readable(ids, &found); !outcome) return outcome;
  for (const int32_t b : found) {
    table->lengths.push_back(static_cast<int32_t>(cached(branches_[b])));
    table->width = std::max(table->width, divide_up(table->lengths.back(), page_size_));
  }
  table->pages.assign(ids.size() * table->width, -1);
  std::vector<Extent> extents;
  for (size_t i = 0; i < ids.size(); ++i) {
    extents.clear();
    for (const int32_t n : path(branches_[found[i]].node))
      extents.insert(extents.end(), nodes_[n].extents.begin(), nodes_[n].extents.end());
    for (size_t first = 0; first < extents.size();) {
      const int64_t block = extents[first].begin / page_size_;
      size_t last = first;
      while (last + 1 < extents.size() && extents[last + 1].begin / page_size_ == block) ++last;
      const int32_t page = extents[last].page;
      for (size_t e = first; e < last && !whole_[page]; ++e)
        if (extents[e].page != page)
          table->copies.push_back({extents[e].page, page,
                                   static_cast<int32_t>(extents[e].begin % page_size_),
                                   static_cast<int32_t>(extents[e + 1].begin % page_size_)});
      whole_[page] = 1;
      table->pages[i * table->width + block] = page;
      first = last + 1;
    }
  }
  return {};
}

Export Tree::export_group(int64_t group) const {
  Export out;
  std::vector<int32_t> members;
  for (const auto& [id, b] : by_id_)
    if (branches_[b].group == group) members.push_back(b);
  const auto older = [&](int32_t a, int32_t b) { return branches_[a].id < branches_[b].id; };
  std::sort(members.begin(), members.end(), older);
  std::vector<bool> wanted(nodes_.size());
  std::vector<int32_t> roots;
  std::unordered_map<int32_t, int32_t> node_of;  // of a branch, in the table
  const auto add = [&](int32_t parent, int32_t start, int32_t version,
                       const std::vector<Token>& tokens) {
    out.parent.push_back(parent);
    out.start.push_back(start);
    out.length.push_back(static_cast<int32_t>(tokens.size()));
    out.kv_version.push_back(version);
    out.tokens.insert(out.tokens.end(), tokens.begin(), tokens.end());
    out.subtree_end.push_back(static_cast<int32_t>(out.tokens.size()));
    return static_cast<int32_t>(out.parent.size()) - 1;
  };
  const auto add_due = [&](int32_t b, int32_t parent) {
    const Branch& branch = branches_[b];
    node_of[b] = branch.due.empty()
                     ? parent
                     : add(parent, static_cast<int32_t>(cached(branch)), -1, branch.due);
  };
  for (const int32_t b : members)
    for (int32_t n = branches_[b].node; n >= 0 && !wanted[n]; n = nodes_[n].parent) {
      wanted[n] = true;
      if (nodes_[n].parent < 0) roots.push_back(n);
    }
  std::vector<std::pair<int32_t, int32_t>> stack;  // a node, and its parent in the table
  for (const int32_t root : roots) {
    stack.push_back({root, -1});
    while (!stack.empty()) {
      const auto [index, parent] = stack.back();
      const Node& node = nodes_[index];
      stack.pop_back();
      const int32_t self = add(parent, node.start, node.version, node.tokens);
      std::vector<int32_t> ending;
      for (const int32_t b : node.attached)
        if (branches_[b].group == group) ending.push_back(b);
      std::sort(ending.begin(), ending.end(), older);
      for (const int32_t b : ending) add_due(b, self);
      for (auto c = node.children.rbegin(); c != node.children.rend(); ++c)
        if (wanted[*c]) stack.push_back({*c, self});
    }
  }
  for (const int32_t b : members)
    if (branches_[b].node < 0) add_due(b, -1);
  for (int64_t i = static_cast<int64_t>(out.parent.size()) - 1; i >= 0; --i)
    if (out.parent[i] >= 0)
      out.subtree_end[out.parent[i]] = std::max(out.subtree_end[out.parent[i]], out.subtree_end[i]);
  for (const int32_t b : members) {
    out.branches.push_back(branches_[b].id);
    out.branch_node.push_back(node_of[b]);
  }
  return out;
}

Outcome Tree::info(int64_t id, BranchInfo* info) const {
  const auto entry = by_id_.find(id);
  if (entry == by_id_.end()) return fail(Status::kUnknownBranch, 0);
  const Branch& branch = branches_[entry->second];
  const int64_t have = cached(branch);
  *info = {have,
           have + static_cast<int64_t>(branch.due.size()),
           branch.group,
           branch.parent < 0 ? -1 : branches_[branch.parent].id,
           branch.suspended,
           branch.pins > 0};
  return {};
}

Outcome Tree::tokens(int64_t id, std::vector<Token>* tokens) const {
  const auto entry = by_id_.find(id);
  if (entry == by_id_.end()) return fail(Status::kUnknownBranch, 0);
  *tokens = all_tokens(branches_[entry->second]);
  return {};
}

Outcome Tree::slots(int64_t id, std::vector<int32_t>* slots) const {
  const auto entry = by_id_.find(id);
  if (entry == by_id_.end()) return fail(Status::kUnknownBranch, 0);
  for (const int32_t n : path(branches_[entry->second].node)) {
    if (!nodes_[n].resident) return fail(Status::kNotComputed, 0);
    for_slots(nodes_[n], [&](int32_t, int32_t slot) { slots->push_back(slot); });
  }
  return {};
}

std::vector<int64_t> Tree::branches() const {
  std::vector<int64_t> ids;
  for (const auto& entry : by_id_) ids.push_back(entry.first);
  std::sort(ids.begin(), ids.end());
  return ids;
}

std::string Tree::check() const {
  struct Use {
    int32_t begin, end, node;
  };
  std::vector<std::vector<Use>> uses(references_.size());
  size_t attached = 0, alive = 0;
  for (size_t i = 0; i < nodes_.size(); ++i) {
    const Node& node = nodes_[i];
    if (!node.alive) continue;
    ++alive;
    const int32_t index = static_cast<int32_t>(i);
    attached += node.attached.size();
    if (node.tokens.empty()) return "an empty node";
    if (node.attached.empty() && node.children.empty()) return "a node that nobody reads";
    if (merges_with_child(node)) return "a chain that was not merged";
    if (node.start != (node.parent < 0 ? 0 : nodes_[node.parent].end()))
      return "a node that does not begin where its parent ends";
    bool held = false;
    for (size_t a = 0; a < node.attached.size(); ++a) {
      const Branch& branch = branches_[node.attached[a]];
      if (branch.node != index || branch.place != static_cast<int32_t>(a))
        return "a branch that is elsewhere";
      held |= holds(branch);
    }
    for (const int32_t c : node.children) {
      if (!nodes_[c].alive || nodes_[c].parent != index) return "a child of somebody else";
      held |= nodes_[c].resident;
    }
    if (held != node.resident) return "pages that nobody wants, or that somebody lacks";
    if (!node.resident && (node.version != -1 || !node.extents.empty())) return "a dropped page";
    if (!node.resident) continue;
    if (node.extents.empty() || node.extents[0].begin != node.start)
      return "a token without a page";
    for (size_t e = 0; e < node.extents.size(); ++e) {
      const Extent& extent = node.extents[e];
      const int32_t end = e + 1 < node.extents.size() ? node.extents[e + 1].begin : node.end();
      if (end <= extent.begin || (end - 1) / page_size_ != extent.begin / page_size_)
        return "an extent over a page's edge";
      uses[extent.page].push_back({extent.begin, end, index});
    }
  }
  if (alive + free_nodes_.size() != nodes_.size()) return "a leaked node";
  std::vector<bool> is_free(references_.size());
  for (const int32_t page : free_pages_) {
    if (is_free[page]) return "a page that is free twice";
    is_free[page] = true;
  }
  for (size_t p = 0; p < uses.size(); ++p) {
    std::vector<Use>& use = uses[p];
    if (static_cast<size_t>(references_[p]) != use.size()) return "a wrong reference count";
    if (use.empty() != is_free[p]) return "a leaked page";
    if (use.empty()) continue;
    std::sort(use.begin(), use.end(), [](const Use& a, const Use& b) { return a.begin < b.begin; });
    if (use[0].begin % page_size_ != first_slot_[p]) return "a wrong first slot";
    for (size_t u = 1; u < use.size(); ++u) {
      if (use[u].begin < use[u - 1].end) return "a slot that is used twice";
      if (use[u].begin / page_size_ != use[0].begin / page_size_) return "a page of two blocks";
      int32_t n = use[u].node;
      while (n >= 0 && n != use[u - 1].node) n = nodes_[n].parent;
      if (n < 0) return "a page of two paths";
    }
  }
  size_t lives = 0, ends = 0;
  for (size_t i = 0; i < branches_.size(); ++i) {
    const Branch& branch = branches_[i];
    if (branch.id < 0) continue;
    ++lives;
    ends += branch.node >= 0;
    const auto entry = by_id_.find(branch.id);
    if (entry == by_id_.end() || entry->second != static_cast<int32_t>(i)) return "a lost branch";
    for (const int32_t f : branch.forks)
      if (branches_[f].id < 0 || branches_[f].parent != static_cast<int32_t>(i))
        return "a fork of somebody else";
  }
  if (lives != by_id_.size() || lives + free_branches_.size() != branches_.size())
    return "a leaked branch";
  if (ends != attached) return "a branch that ends nowhere";
  return "";
}

}  // namespace rlkern::kv
