// Random operations on the KV tree against a dense dictionary: every branch with all its tokens.
//
//   fuzz_tree OPERATIONS SEED
//
// A slot of the pool holds what a kernel would have written there, as a hash of the whole prefix
// and the version of the weights. After every operation the tree counts itself again, and what
// branches read through slots, plans and block tables is compared with the dictionary.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <set>

#include "tree.h"

using namespace rlkern::kv;

namespace {

struct Cell {
  uint64_t prefix = 0;
  int32_t version = -2;
};

struct Model {
  std::vector<int32_t> tokens;
  int64_t cached = 0, group = 0, parent = -1;
  int pins = 0;
  bool suspended = false;
};

uint64_t mixed(uint64_t hash, uint64_t x) {
  hash ^= x + 0x9E3779B97F4A7C15ull + (hash << 6) + (hash >> 2);
  return hash * 0xBF58476D1CE4E5B9ull;
}

const char* const kPolicies[] = {"recompute", "keep", "forbid"};

class Fuzz {
 public:
  Fuzz(uint64_t seed) : random_(seed) {
    const int64_t sizes[] = {1, 3, 4, 16};
    page_size_ = sizes[pick(4)];
    policy_ = static_cast<Stale>(pick(3));
    const int64_t pages = 4 + pick(pick(4) == 0 ? 8 : 120);
    most_branches_ = 2 + pick(30);
    tree_.emplace_back(pages, page_size_, policy_);
    memory_.resize(pages * page_size_);
  }

  void run(int64_t operations) {
    for (int64_t i = 0; i < operations; ++i) {
      step();
      require(tree().check().empty(), tree().check().c_str());
      if (i % 8 == 0) compare_all();
    }
    compare_all();
    std::vector<int64_t> all = ids();
    for (const int64_t id : all)
      for (; model_[id].pins > 0; --model_[id].pins) ok(tree().pin(one(id), false));
    ok(tree().prune(all, false));
    require(tree().free_pages() == tree().num_pages(), "a page is left when nobody is");
    require(tree().num_nodes() == 0, "a node is left when nobody is");
  }

  static int64_t refusals, counts[16];

 private:
  Tree& tree() { return tree_[0]; }
  int64_t pick(int64_t n) { return static_cast<int64_t>(random_() % static_cast<uint64_t>(n)); }
  std::vector<int64_t> one(int64_t id) { return {id}; }

  void require(bool truth, const char* what) {
    if (truth) return;
    std::printf("operation %lld (page size %lld, %s): %s\n", static_cast<long long>(verb_),
                static_cast<long long>(page_size_), kPolicies[static_cast<int>(policy_)], what);
    std::exit(1);
  }
  void ok(const Outcome& outcome) { require(static_cast<bool>(outcome), "refused"); }
  void is(const Outcome& outcome, Status status) {
    require(outcome.status == status, "another status");
  }

  std::vector<int64_t> ids() {
    std::vector<int64_t> all;
    for (const auto& [id, model] : model_) all.push_back(id);
    return all;
  }
  // Up to `most` different branches, in any order.
  std::vector<int64_t> some(int64_t most, bool live = true) {
    std::vector<int64_t> all;
    for (const auto& [id, model] : model_)
      if (!live || !model.suspended) all.push_back(id);
    std::shuffle(all.begin(), all.end(), random_);
    if (static_cast<int64_t>(all.size()) > most) all.resize(most);
    return all;
  }

  // All that can be seen of the tree.
  std::vector<int64_t> snapshot() {
    std::vector<int64_t> seen{tree().free_pages(), tree().num_nodes(), tree().version()};
    for (const int64_t id : tree().branches()) {
      BranchInfo info;
      ok(tree().info(id, &info));
      seen.insert(seen.end(),
                  {id, info.cached, info.known, info.parent, info.suspended, info.pinned});
      std::vector<int32_t> slots;
      if (tree().slots(id, &slots)) seen.insert(seen.end(), slots.begin(), slots.end());
    }
    return seen;
  }

  uint64_t prefix_hash(const Model& model, int64_t length) {
    uint64_t hash = 1;
    for (int64_t p = 0; p < length; ++p) hash = mixed(hash, model.tokens[p]);
    return hash;
  }

  void write(const Work& work) {
    for (size_t s = 0; s < work.branches.size(); ++s) {
      const Model& model = model_.at(work.branches[s]);
      for (int64_t i = work.offsets[s]; i < work.offsets[s + 1]; ++i) {
        const int32_t position = work.positions[i];
        require(position < static_cast<int64_t>(model.tokens.size()), "a position past the end");
        require(model.tokens[position] == work.tokens[i], "another token to feed");
        memory_[work.slots[i]] = {prefix_hash(model, position + 1), tree().version()};
      }
    }
  }

  void compare_content(const Model& model, int64_t position, int32_t slot, uint64_t hash) {
    const Cell& cell = memory_[slot];
    require(cell.prefix == hash, "somebody else's key");
    if (policy_ != Stale::kKeep) require(cell.version == tree().version(), "a stale key");
    require(cell.version >= 0 && position < model.cached, "a key that was never written");
  }

  // Whether a read of these branches is allowed, by the dictionary and the versions in memory.
  Status readable(const std::vector<int64_t>& batch) {
    for (const int64_t id : batch) {
      const Model& model = model_[id];
      if (model.suspended) return Status::kSuspended;
      std::vector<int32_t> slots;
      ok(tree().slots(id, &slots));
      for (int64_t p = model.cached - 1; p >= 0; --p) {
        if (memory_[slots[p]].prefix != prefix_hash(model, p + 1)) return Status::kNotComputed;
        if (policy_ != Stale::kKeep && memory_[slots[p]].version != tree().version())
          return Status::kStale;
      }
    }
    return Status::kOk;
  }

  void compare_all() {
    std::set<int32_t> pages;
    std::vector<int64_t> readers;
    for (auto& [id, model] : model_) {
      BranchInfo info;
      ok(tree().info(id, &info));
      require(info.cached == model.cached, "another number of cached tokens");
      require(info.known == static_cast<int64_t>(model.tokens.size()), "another number of tokens");
      require(info.parent == model.parent && info.group == model.group, "another parent");
      require(info.suspended == model.suspended && info.pinned == (model.pins > 0),
              "another state");
      std::vector<Token> tokens;
      ok(tree().tokens(id, &tokens));
      for (size_t p = 0; p < tokens.size(); ++p)
        require(tokens[p].id == model.tokens[p], "another token");
      std::vector<int32_t> slots;
      if (!tree().slots(id, &slots)) {
        require(model.suspended, "a live branch without pages");
        continue;
      }
      require(static_cast<int64_t>(slots.size()) == model.cached, "another number of slots");
      for (size_t p = 0; p < slots.size(); ++p) {
        require(slots[p] % page_size_ == static_cast<int64_t>(p) % page_size_,
                "a slot out of line");
        pages.insert(slots[p] / static_cast<int32_t>(page_size_));
      }
      if (!model.suspended && model.cached >= 0 &&
          tree().plan(one(id), one(1), 8, true, &scratch()))
        readers.push_back(id);
    }
    require(tree().branches() == ids(), "other branches");
    require(static_cast<int64_t>(pages.size()) == tree().num_pages() - tree().free_pages(),
            "a leaked page");
    compare_reads(readers);
  }

  std::set<int32_t> used_pages() {
    std::set<int32_t> pages;
    for (const int64_t id : tree().branches()) {
      std::vector<int32_t> slots;
      if (tree().slots(id, &slots))
        for (const int32_t slot : slots) pages.insert(slot / static_cast<int32_t>(page_size_));
    }
    return pages;
  }

  Plan& scratch() {
    scratch_ = Plan{};
    return scratch_;
  }

  // Every way to read, for branches that may be read.
  void compare_reads(std::vector<int64_t> batch) {
    std::shuffle(batch.begin(), batch.end(), random_);
    if (pick(2)) batch.resize(batch.size() / 2);
    const int64_t chunk = 1 + pick(9);
    std::vector<int64_t> counts;
    for (const int64_t id : batch)
      counts.push_back(pick(2) ? 1 : pick(std::max<int64_t>(model_[id].cached, 1) + 1));
    for (const bool share : {true, false}) {
      Plan plan;
      ok(tree().plan(batch, counts, chunk, share, &plan));
      compare_plan(batch, counts, plan, chunk, share);
    }
    if (!batch.empty()) {
      counts[0] = std::max<int64_t>(model_[batch[0]].cached, 1) + 1;
      is(tree().plan(batch, counts, chunk, true, &scratch()), Status::kBadPosition);
    }
    if (pick(3) == 0) {
      BlockTable table;
      ok(tree().block_table(batch, &table));
      for (const auto& copy : table.copies)
        for (int32_t s = copy.begin; s < copy.end; ++s)
          memory_[copy.to * page_size_ + s] = memory_[copy.from * page_size_ + s];
      for (size_t i = 0; i < batch.size(); ++i) {
        const Model& model = model_[batch[i]];
        require(table.lengths[i] == model.cached, "another length in the block table");
        uint64_t hash = 1;
        for (int64_t p = 0; p < model.cached; ++p) {
          hash = mixed(hash, model.tokens[p]);
          const int64_t page = table.pages[i * table.width + p / page_size_];
          compare_content(model, p, static_cast<int32_t>(page * page_size_ + p % page_size_), hash);
        }
      }
    }
  }

  void compare_plan(const std::vector<int64_t>& batch, const std::vector<int64_t>& counts,
                    const Plan& plan, int64_t chunk, bool share) {
    struct Row {
      int64_t id, end;
    };
    std::vector<Row> wanted;
    for (size_t i = 0; i < batch.size(); ++i)
      for (int64_t r = counts[i]; r > 0; --r)
        wanted.push_back({batch[i], std::max<int64_t>(model_[batch[i]].cached - r + 1, 0)});
    require(plan.rows.size() == wanted.size(), "another number of rows");
    std::vector<const int32_t*> item_of(plan.parts.size());
    for (size_t i = 0; i * kItemFields < plan.items.size(); ++i) {
      const int32_t* item = &plan.items[i * kItemFields];
      for (int32_t r = 0; r < item[kRowCount]; ++r) item_of[item[kPartBegin] + r] = item;
    }
    std::set<int32_t> rows(plan.rows.begin(), plan.rows.end());
    require(rows.size() == wanted.size(), "a row twice");
    size_t keys = 0;
    std::set<int32_t> distinct;
    for (size_t r = 0; r < plan.rows.size(); ++r) {
      const auto [id, end] = wanted[plan.rows[r]];
      const Model& model = model_[id];
      int64_t p = 0;
      uint64_t hash = 1;
      for (int32_t i = plan.part_offsets[r]; i < plan.part_offsets[r + 1]; ++i) {
        const int32_t* item = item_of[plan.parts[i]];
        require(item[kChunk] * chunk == p, "a chunk that does not begin at a multiple");
        require(plan.parts[i] - item[kPartBegin] + item[kRowBegin] == static_cast<int32_t>(r),
                "another row's part");
        const int64_t want = std::min(chunk, end - p);
        require(item[kSlotCount] == want, "a chunk of another length");
        for (int32_t s = 0; s < item[kSlotCount]; ++s, ++p) {
          hash = mixed(hash, model.tokens[p]);
          compare_content(model, p, plan.slots[item[kSlotBegin] + s], hash);
        }
        keys += item[kSlotCount];
      }
      require(p == end, "keys are missing");
    }
    for (const int32_t slot : plan.slots) distinct.insert(slot);
    if (!share) require(plan.slots.size() == keys, "rows that share");
    // what all rows of a batch read in one node is listed once, but for the chunks over its ends
    if (share && chunk == 1) require(plan.slots.size() == distinct.size(), "a key read twice");
  }

  void append_slots() {
    std::vector<int64_t> batch = some(1 + pick(8)), counts;
    for (const int64_t id : batch) {
      const int64_t due = static_cast<int64_t>(model_[id].tokens.size()) - model_[id].cached;
      counts.push_back(pick(3) ? -1 : pick(due + 1));
    }
    const Status may = readable(batch);
    const std::vector<int64_t> before = snapshot();
    Work work;
    const Outcome outcome = tree().append_slots(batch, counts, &work);
    if (outcome.status == Status::kOutOfPages) {
      ++refusals;
      require(may == Status::kOk, "out of pages before stale");
      require(outcome.needed > tree().free_pages(), "refused although there were pages");
      require(before == snapshot(), "a refused call changed something");
      return;
    }
    is(outcome, may);
    if (may != Status::kOk)
      return require(before == snapshot(), "a refused call changed something");
    for (size_t i = 0; i < batch.size(); ++i) {
      Model& model = model_[batch[i]];
      const int64_t due = static_cast<int64_t>(model.tokens.size()) - model.cached;
      const int64_t count = counts[i] < 0 ? due : counts[i];
      require(work.offsets[i + 1] - work.offsets[i] == count, "another number of slots");
      model.cached += count;
    }
    write(work);
  }

  void fork() {
    if (static_cast<int64_t>(model_.size()) >= most_branches_) return prune();
    std::vector<int64_t> batch = some(1 + pick(3)), counts, at, children;
    const bool forced = pick(3) == 0;
    std::vector<int32_t> tokens;
    for (const int64_t id : batch) {
      counts.push_back(forced ? 1 + pick(3) : pick(4));
      const int64_t known = static_cast<int64_t>(model_[id].tokens.size());
      at.push_back(
          pick(2) || (known == 0 && !forced) ? -1 : (forced ? pick(known + 1) : 1 + pick(known)));
      for (int64_t j = 0; forced && j < counts.back(); ++j) tokens.push_back(next_token_++);
    }
    ok(tree().fork(batch, counts, at, tokens, {}, &children));
    size_t child = 0;
    for (size_t i = 0; i < batch.size(); ++i)
      for (int64_t j = 0; j < counts[i]; ++j, ++child) {
        Model model = model_[batch[i]];
        model.parent = batch[i];
        model.pins = 0;
        if (at[i] >= 0) {
          model.tokens.resize(at[i]);
          model.cached = std::min(model.cached, at[i] - !forced);
        }
        if (forced) model.tokens.push_back(tokens[child]);
        model_[children[child]] = model;
      }
  }

  void remove(int64_t id) {
    const int64_t parent = model_[id].parent;
    for (auto& [other, model] : model_)
      if (model.parent == id) model.parent = parent;
    model_.erase(id);
  }

  bool is_below(int64_t id, const std::set<int64_t>& above) {
    for (int64_t p = id; p >= 0; p = model_[p].parent)
      if (above.count(p)) return true;
    return false;
  }

  void prune() {
    const std::vector<int64_t> batch = some(1 + pick(6), false);
    const bool subtree = pick(2);
    bool pinned = false;
    for (const int64_t id : batch) pinned |= model_[id].pins > 0;
    const std::vector<int64_t> before = snapshot();
    const Outcome outcome = tree().prune(batch, subtree);
    is(outcome, pinned ? Status::kPinned : Status::kOk);
    if (pinned) return require(before == snapshot(), "a refused call changed something");
    const std::set<int64_t> above(batch.begin(), batch.end());
    std::vector<int64_t> gone = batch;
    for (const auto& [id, model] : model_)
      if (subtree && !above.count(id) && is_below(id, above) && model.pins == 0) gone.push_back(id);
    for (const int64_t id : gone) remove(id);
  }

  void truncate() {
    std::vector<int64_t> batch = some(1 + pick(3)), lengths;
    bool pinned = false, fits = true;
    for (const int64_t id : batch) {
      pinned |= model_[id].pins > 0;
      const int64_t known = static_cast<int64_t>(model_[id].tokens.size());
      lengths.push_back(pick(20) ? 1 + pick(std::max<int64_t>(1, known)) : pick(3) * known);
      fits &= lengths.back() >= 1 && lengths.back() <= known;
    }
    const std::vector<int64_t> before = snapshot();
    const Outcome outcome = tree().truncate(batch, lengths);
    if (pinned || !fits) {
      require(!outcome && before == snapshot(), "a wrong truncation was taken");
      return;
    }
    ok(outcome);
    for (size_t i = 0; i < batch.size(); ++i) {
      Model& model = model_[batch[i]];
      model.tokens.resize(lengths[i]);
      model.cached = std::min(model.cached, lengths[i] - 1);
    }
  }

  void resample() {
    const std::vector<int64_t> batch = some(1 + pick(8));
    std::vector<int64_t> parents, next;
    for (size_t i = 0; i < batch.size(); ++i)
      parents.push_back(pick(static_cast<int64_t>(batch.size())));
    ok(tree().resample(batch, parents, &next));
    std::map<int64_t, Model> added;
    std::set<int64_t> continued;
    for (size_t i = 0; i < batch.size(); ++i) {
      const int64_t parent = batch[parents[i]];
      if (continued.insert(parent).second) {
        require(next[i] == parent, "the first offspring is another branch");
        continue;
      }
      added[next[i]] = model_[parent];
      added[next[i]].parent = parent;
      added[next[i]].pins = 0;
    }
    model_.insert(added.begin(), added.end());
    for (const int64_t id : batch)
      if (!continued.count(id) && model_[id].pins == 0) remove(id);
  }

  void resume() {
    std::vector<int64_t> batch;
    for (const int64_t id : some(4, false))
      if (model_[id].suspended || pick(8) == 0) batch.push_back(id);
    const std::vector<int64_t> before = snapshot();
    const std::set<int32_t> held = used_pages();
    const Outcome outcome = tree().resume(batch);
    if (outcome.status == Status::kOutOfPages) {
      ++refusals;
      require(outcome.needed > tree().free_pages(), "refused although there were pages");
      require(before == snapshot(), "a refused call changed something");
      return;
    }
    ok(outcome);
    for (const int64_t id : batch) model_[id].suspended = false;
    // a page may come back with what it held before: that would pass for computed
    for (const int32_t page : used_pages())
      if (!held.count(page)) std::fill_n(memory_.begin() + page * page_size_, page_size_, Cell{});
  }

  void recompute() {
    const std::vector<int64_t> batch = some(1 + pick(6));
    const std::vector<int64_t> before = snapshot();
    bool stale = false;
    for (const int64_t id : batch) {
      std::vector<int32_t> slots;
      ok(tree().slots(id, &slots));
      for (size_t p = 0; p < slots.size(); ++p)
        stale |= memory_[slots[p]].prefix == prefix_hash(model_[id], p + 1) &&
                 memory_[slots[p]].version != tree().version();
    }
    Work work;
    const Outcome outcome = tree().recompute(batch, &work);
    if (policy_ == Stale::kForbid) {
      // a slot that a lost token had before may look stale where it is not computed
      if (!outcome) {
        require(stale, "refused without reason");
        is(outcome, Status::kStale);
        return require(before == snapshot(), "a refused call changed something");
      }
    } else {
      ok(outcome);
    }
    write(work);
    is(outcome, readable(batch));
  }

  void misuse() {
    std::vector<int64_t> batch = some(2, false), children;
    Work work;
    const std::vector<int64_t> before = snapshot();
    batch.push_back(pick(2) || batch.empty() ? 1'000'000'000 : batch[0]);
    const std::vector<int64_t> many(batch.size(), -1), zero(batch.size(), 0);
    const std::vector<int64_t> offsets(batch.size() + 1, 0);
    Plan plan;
    BlockTable table;
    require(!tree().fork(batch, zero, many, {}, {}, &children), "taken");
    require(!tree().prune(batch, true), "taken");
    require(!tree().truncate(batch, zero), "taken");
    require(!tree().resample(batch, zero, &children), "taken");
    require(!tree().append_slots(batch, many, &work), "taken");
    require(!tree().append(batch, {}, offsets, {}), "taken");
    require(!tree().suspend(batch, true), "taken");
    require(!tree().resume(batch), "taken");
    require(!tree().recompute(batch, &work), "taken");
    require(!tree().pin(batch, true), "taken");
    require(!tree().plan(batch, zero, 4, true, &plan), "taken");
    require(!tree().block_table(batch, &table), "taken");
    require(before == snapshot(), "a refused call changed something");
  }

  void compare_export() {
    const Export table = tree().export_group(pick(3));
    for (size_t b = 0; b < table.branches.size(); ++b) {
      std::vector<int32_t> tokens;
      std::vector<int32_t> nodes;
      for (int32_t n = table.branch_node[b]; n >= 0; n = table.parent[n]) nodes.push_back(n);
      const Model& model = model_.at(table.branches[b]);
      std::vector<int64_t> begins{0};
      for (const int32_t length : table.length) begins.push_back(begins.back() + length);
      for (auto n = nodes.rbegin(); n != nodes.rend(); ++n) {
        require(table.start[*n] == static_cast<int32_t>(tokens.size()), "another start");
        // a descendant's tokens lie inside
        const int32_t last = table.branch_node[b];
        require(begins[last + 1] <= table.subtree_end[*n], "a subtree that ends too early");
        for (int32_t t = 0; t < table.length[*n]; ++t)
          tokens.push_back(table.tokens[begins[*n] + t].id);
      }
      require(tokens == model.tokens, "another sequence in the export");
      std::vector<int32_t> slots;
      if (!tree().slots(table.branches[b], &slots)) continue;
      for (const int32_t n : nodes)
        for (int32_t t = 0; table.kv_version[n] >= 0 && t < table.length[n]; ++t)
          require(memory_[slots[table.start[n] + t]].version == table.kv_version[n],
                  "a node of another version");
    }
  }

  void step() {
    verb_ = pick(32);
    ++counts[verb_ / 2];
    switch (verb_) {
      case 0:
      case 1: {
        if (static_cast<int64_t>(model_.size()) >= most_branches_) return prune();
        std::vector<int32_t> tokens;
        for (int64_t n = pick(40); n > 0; --n) tokens.push_back(next_token_++);
        const int64_t offsets[] = {0, static_cast<int64_t>(tokens.size())}, group[] = {pick(3)};
        const int64_t id = tree().create(tokens, offsets, group, {})[0];
        model_[id].tokens = tokens;
        model_[id].group = group[0];
        return;
      }
      case 2:
      case 3:
      case 4:
      case 5:
        return fork();
      case 6:
      case 7:
        return prune();
      case 8:
      case 9:
        return truncate();
      case 10:
        return resample();
      case 11: {
        const std::vector<int64_t> batch = some(1, false);
        if (batch.empty()) return;
        Model& model = model_[batch[0]];
        if (pick(3)) {
          const Outcome outcome = tree().pin(batch, false);
          is(outcome, model.pins ? Status::kOk : Status::kPinned);
          model.pins -= model.pins > 0;
        } else {
          is(tree().pin(batch, true), model.suspended ? Status::kSuspended : Status::kOk);
          model.pins += !model.suspended;
        }
        return;
      }
      case 12: {
        const std::vector<int64_t> batch = some(4);
        ok(tree().suspend(batch, pick(2)));
        for (const int64_t id : batch) model_[id].suspended = true;
        return;
      }
      case 13:
      case 14:
        return resume();
      case 15:
        if (pick(4) == 0) ok(tree().set_version(tree().version() + static_cast<int32_t>(pick(3))));
        return;
      case 16:
      case 17:
        return recompute();
      case 18:
        return misuse();
      case 19:
        return compare_export();
      case 20:
      case 21:
      case 22:
      case 23:
      case 24: {
        const std::vector<int64_t> batch = some(8);
        std::vector<int32_t> tokens;
        std::vector<int64_t> offsets{0};
        for (const int64_t id : batch) {
          for (int64_t n = pick(4) ? 1 : pick(8); n > 0; --n) {
            model_[id].tokens.push_back(next_token_);
            tokens.push_back(next_token_++);
          }
          offsets.push_back(static_cast<int64_t>(tokens.size()));
        }
        return ok(tree().append(batch, tokens, offsets, {}));
      }
      default:
        return append_slots();
    }
  }

  std::mt19937_64 random_;
  std::vector<Tree> tree_;
  int64_t page_size_, most_branches_, verb_ = -1;
  Stale policy_;
  int32_t next_token_ = 0;
  std::map<int64_t, Model> model_;
  std::vector<Cell> memory_;
  Plan scratch_;
};

int64_t Fuzz::refusals = 0;
int64_t Fuzz::counts[16] = {};

}  // namespace

int main(int argc, char** argv) {
  const int64_t operations = argc > 1 ? std::atoll(argv[1]) : 10000;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0;
  const int64_t episode = 2000;
  for (int64_t done = 0; done < operations; done += episode)
    Fuzz(seed * 1'000'003 + done / episode).run(std::min(episode, operations - done));
  std::printf("%lld operations, %lld refused for lack of pages\n",
              static_cast<long long>(operations), static_cast<long long>(Fuzz::refusals));
  return Fuzz::refusals > 0 ? 0 : 1;
}
