// The structs that operators take, made of the table in records.inc.
#pragma once

#include "steppo/types.h"

namespace steppo {

#define STEPPO_RECORD(name) struct name {
#define STEPPO_FIELD(type, name) type name;
#define STEPPO_END(name) \
  }                      \
  ;
#include "steppo/records.inc"
#undef STEPPO_RECORD
#undef STEPPO_FIELD
#undef STEPPO_END

// An operator: its records, and where it runs. It writes its outputs in full.
template <class... Records>
using Operator = void(const Records&..., const Place&);

}  // namespace steppo
