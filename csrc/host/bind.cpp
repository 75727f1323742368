// rlkern._C_host: the tree for Python. Arrays come in and go out as numpy; what is refused raises.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <utility>

#include "tree.h"

namespace py = pybind11;

namespace rlkern::kv {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

template <class T>
std::span<const T> view(const Array<T>& array) {
  return {array.data(), static_cast<size_t>(array.size())};
}

// An array that owns the vector's memory.
template <class T>
py::array_t<T> give(std::vector<T>&& vector) {
  auto* const owned = new std::vector<T>(std::move(vector));
  const py::capsule owner(owned, [](void* p) { delete static_cast<std::vector<T>*>(p); });
  return py::array_t<T>(owned->size(), owned->data(), owner);
}

template <class T>
py::array_t<T> give(std::vector<T>&& vector, int64_t rows, int64_t columns) {
  return give(std::move(vector)).reshape({rows, columns});
}

py::tuple give_tokens(const std::vector<Token>& tokens) {
  std::vector<int32_t> ids, versions;
  std::vector<float> logprob, entropy;
  for (const Token& token : tokens) {
    ids.push_back(token.id);
    logprob.push_back(token.logprob);
    entropy.push_back(token.entropy);
    versions.push_back(token.version);
  }
  return py::make_tuple(give(std::move(ids)), give(std::move(logprob)), give(std::move(entropy)),
                        give(std::move(versions)));
}

py::tuple give_work(Work&& work) {
  return py::make_tuple(give(std::move(work.slots)), give(std::move(work.positions)),
                        give(std::move(work.tokens)), give(std::move(work.offsets)),
                        give(std::move(work.branches)));
}

// Raises rlkern.kv's exception for what was refused.
void check(const Outcome& outcome, const char* verb, std::span<const int64_t> ids,
           const Tree& tree) {
  if (outcome) return;
  const int64_t id =
      outcome.at >= 0 && outcome.at < static_cast<int64_t>(ids.size()) ? ids[outcome.at] : -1;
  py::module_::import("rlkern.kv._errors")
      .attr("refuse")(static_cast<int>(outcome.status), verb, id, outcome.needed,
                      tree.free_pages());
}

}  // namespace
}  // namespace rlkern::kv

PYBIND11_MODULE(_C_host, m) {
  using namespace rlkern::kv;
  using Ids = Array<int64_t>;
  using Tokens = Array<int32_t>;
  using Floats = Array<float>;
  m.doc() = "The prefix tree of a paged KV cache; rlkern.kv is its public face.";
  py::class_<Tree>(m, "Tree")
      .def(py::init([](int64_t num_pages, int64_t page_size, int stale) {
        return std::make_unique<Tree>(num_pages, page_size, static_cast<Stale>(stale));
      }))
      .def("create",
           [](Tree& tree, const Tokens& tokens, const Ids& offsets, const Ids& groups,
              const Floats& logprob, const Floats& entropy) {
             return give(tree.create(view(tokens), view(offsets), view(groups),
                                     {view(logprob), view(entropy)}));
           })
      .def("fork",
           [](Tree& tree, const Ids& ids, const Ids& counts, const Ids& at, const Tokens& forced,
              const Floats& logprob, const Floats& entropy) {
             std::vector<int64_t> children;
             check(tree.fork(view(ids), view(counts), view(at), view(forced),
                             {view(logprob), view(entropy)}, &children),
                   "fork", view(ids), tree);
             return give(std::move(children));
           })
      .def("prune",
           [](Tree& tree, const Ids& ids, bool subtree) {
             check(tree.prune(view(ids), subtree), "prune", view(ids), tree);
           })
      .def("truncate",
           [](Tree& tree, const Ids& ids, const Ids& lengths) {
             check(tree.truncate(view(ids), view(lengths)), "truncate", view(ids), tree);
           })
      .def("resample",
           [](Tree& tree, const Ids& ids, const Ids& parents) {
             std::vector<int64_t> next;
             check(tree.resample(view(ids), view(parents), &next), "resample", view(ids), tree);
             return give(std::move(next));
           })
      .def("pin",
           [](Tree& tree, const Ids& ids, bool pinned) {
             check(tree.pin(view(ids), pinned), pinned ? "pin" : "unpin", view(ids), tree);
           })
      .def("suspend",
           [](Tree& tree, const Ids& ids, bool drop) {
             check(tree.suspend(view(ids), drop), "suspend", view(ids), tree);
           })
      .def("resume",
           [](Tree& tree, const Ids& ids) {
             check(tree.resume(view(ids)), "resume", view(ids), tree);
           })
      .def("set_version",
           [](Tree& tree, int32_t version) {
             const Ids ids;
             check(tree.set_version(version), "bump_version", view(ids), tree);
           })
      .def("append",
           [](Tree& tree, const Ids& ids, const Tokens& tokens, const Ids& offsets,
              const Floats& logprob, const Floats& entropy) {
             check(tree.append(view(ids), view(tokens), view(offsets),
                               {view(logprob), view(entropy)}),
                   "append", view(ids), tree);
           })
      .def("append_slots",
           [](Tree& tree, const Ids& ids, const Ids& counts) {
             Work work;
             check(tree.append_slots(view(ids), view(counts), &work), "append_slots", view(ids),
                   tree);
             return give_work(std::move(work));
           })
      .def("recompute",
           [](Tree& tree, const Ids& ids) {
             Work work;
             check(tree.recompute(view(ids), &work), "recompute", view(ids), tree);
             return give_work(std::move(work));
           })
      .def("plan",
           [](Tree& tree, const Ids& ids, const Ids& counts, int64_t chunk, bool share) {
             Plan plan;
             check(tree.plan(view(ids), view(counts), chunk, share, &plan), "plan", view(ids),
                   tree);
             return py::make_tuple(give(std::move(plan.rows)), give(std::move(plan.items)),
                                   give(std::move(plan.slots)), give(std::move(plan.trees)),
                                   give(std::move(plan.parts)), give(std::move(plan.part_offsets)),
                                   plan.max_rows);
           })
      .def("block_table",
           [](Tree& tree, const Ids& ids) {
             BlockTable table;
             check(tree.block_table(view(ids), &table), "block_table", view(ids), tree);
             std::vector<int64_t> from, to;
             for (const BlockTable::Copy& copy : table.copies)
               for (int64_t s = copy.begin; s < copy.end; ++s) {
                 from.push_back(copy.from * tree.page_size() + s);
                 to.push_back(copy.to * tree.page_size() + s);
               }
             const int64_t rows = static_cast<int64_t>(table.lengths.size());
             return py::make_tuple(give(std::move(table.pages), rows, table.width),
                                   give(std::move(table.lengths)), give(std::move(from)),
                                   give(std::move(to)));
           })
      .def("export_group",
           [](const Tree& tree, int64_t group) {
             Export out = tree.export_group(group);
             return py::make_tuple(give(std::move(out.parent)), give(std::move(out.start)),
                                   give(std::move(out.length)), give(std::move(out.subtree_end)),
                                   give(std::move(out.kv_version)), give_tokens(out.tokens),
                                   give(std::move(out.branches)), give(std::move(out.branch_node)));
           })
      .def("tokens",
           [](const Tree& tree, int64_t id) {
             std::vector<Token> tokens;
             check(tree.tokens(id, &tokens), "tokens", {&id, 1}, tree);
             return give_tokens(tokens);
           })
      .def("slots",
           [](const Tree& tree, int64_t id) {
             std::vector<int32_t> slots;
             check(tree.slots(id, &slots), "slots", {&id, 1}, tree);
             return give(std::move(slots));
           })
      .def("info",
           [](const Tree& tree, const Ids& ids) {
             std::vector<int64_t> fields;
             for (const int64_t id : view(ids)) {
               BranchInfo info;
               check(tree.info(id, &info), "info", {&id, 1}, tree);
               fields.insert(fields.end(), {info.cached, info.known, info.group, info.parent,
                                            info.suspended, info.pinned});
             }
             return give(std::move(fields), ids.size(), 6);
           })
      .def("branches", [](const Tree& tree) { return give(tree.branches()); })
      .def("check", &Tree::check)
      .def_property_readonly("num_pages", &Tree::num_pages)
      .def_property_readonly("free_pages", &Tree::free_pages)
      .def_property_readonly("num_nodes", &Tree::num_nodes)
      .def_property_readonly("version", &Tree::version);
}
